"""Weights into int8 and int4: to nearest, by GPTQ or AWQ, and what it costs, measured."""
