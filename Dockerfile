# camelid on a CPU:  docker build -t camelid .  &&  docker run --rm -it -v "$PWD:/work" camelid doctor
# A server:          docker run --rm -p 8000:8000 -e CAMELID_API_KEY -v "$PWD:/work" camelid serve MODEL --host 0.0.0.0
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++
COPY . /src
RUN pip wheel --no-deps --wheel-dir /wheels /src

FROM python:3.12-slim
RUN pip install --no-cache-dir "torch>=2.11,<2.15" --index-url https://download.pytorch.org/whl/cpu
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[all]" && useradd --create-home camelid
USER camelid
WORKDIR /work
EXPOSE 8000
ENTRYPOINT ["camelid"]
