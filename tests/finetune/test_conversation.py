"""What is learned of a conversation: the answers and their ends, counted by hand and by transformers."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from camelid.errors import InputError
from camelid.finetune.conversation import Encoder, Example, end_of_turn
from camelid.finetune.pack import PackedExamples
from camelid.finetune.records import BadRow, record
from camelid.finetune.show import shown
from camelid.formats.load import load_tokenizer
from camelid.tokenizer.template import ALPACA, CHATML, LLAMA2, LLAMA3
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.tokens.batch import IGNORE

from ..conftest import TEXT

CHAT = [
    {"role": "user", "content": "What is life?"}, {"role": "assistant", "content": "To learn."},
    {"role": "user", "content": "And then?"}, {"role": "assistant", "content": "To teach."},
]  # fmt: skip
SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def learned(example: Example) -> list[int]:
    return [label for label in example.labels if label != IGNORE]


@pytest.fixture
def chatml(tmp_path: Path) -> Tokenizer:
    """A byte-level tokenizer with ChatML's two control tokens."""
    from tokenizers import AddedToken, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend
    from tokenizers.decoders import ByteLevel
    from tokenizers.models import BPE

    backend = Backend(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevel()
    backend.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, show_progress=False,
                                initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    return Tokenizer(backend, eos_token_id=backend.token_to_id("<|im_end|>"), chat_template=CHATML)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_the_loss_is_on_the_answers_and_their_ends(tokenizers: dict[str, Path], kind: str) -> None:
    tokenizer = load_tokenizer(tokenizers[kind])
    example = Encoder(tokenizer).conversation([SYSTEM, *CHAT])
    end = end_of_turn(example, tokenizer)
    assert end is not None
    assert tokenizer.token(end) in ("<|eot_id|>", "</s>")
    assert learned(example).count(end) == 2
    text = tokenizer.decode([i for i in learned(example) if i != end])
    assert text.replace(" ", "") == "Tolearn.Toteach."
    assert example.ids == tokenizer.apply_chat_template([SYSTEM, *CHAT], add_generation_prompt=False)
    assert len(learned(Encoder(tokenizer).conversation(CHAT, since=len(CHAT) - 1))) < len(learned(example))


def test_what_a_template_leaves_out_of_an_answer_is_told(chatml: Tokenizer) -> None:
    """DeepSeek-R1's template drops what stands before </think>, most others what a turn has as its reasoning."""
    thought = [CHAT[0], {"role": "assistant", "content": "<think>hm</think>\n\nTo learn."}]
    aside = [CHAT[0], {"role": "assistant", "content": "To learn.", "reasoning_content": "hm"}]
    assert "hm" in chatml.decode(learned(Encoder(chatml).conversation(thought)))
    with pytest.raises(BadRow, match=r"turn 2\) of whose reasoning_content the chat template leaves out"):
        Encoder(chatml).conversation(aside)
    last = "{{ message['content'].split('</think>')[-1] if message['role'] == 'assistant' else message['content'] }}"
    chatml.chat_template = CHATML.replace("{{ message['content'] }}", last)
    assert last in chatml.chat_template
    with pytest.raises(BadRow, match=r"turn 2\) of whose content the chat template leaves out"):
        Encoder(chatml).conversation(thought)
    spaced = "{{ message['content'].replace('</think>\\n\\n', '\\n</think>\\n') }}"  # some set their own blanks
    chatml.chat_template = CHATML.replace("{{ message['content'] }}", spaced)
    assert "hm" in chatml.decode(learned(Encoder(chatml).conversation(thought)))
    chatml.chat_template = CHATML.replace(
        "{{ message['content'] }}", "{{ message.reasoning_content }}{{ message['content'] }}"
    )
    assert "hm" in chatml.decode(learned(Encoder(chatml).conversation(aside)))


def test_counts_by_hand_in_five_formats(chatml: Tokenizer) -> None:
    """200 conversations: each answer's own tokens and one end, whatever format it came in."""
    draw, encoder = random.Random(1), Encoder(chatml)

    def words() -> str:
        return " ".join(draw.choice(TEXT[draw.randrange(4)].split()) for _ in range(draw.randint(1, 12)))

    total = 0
    for number in range(200):
        turns = [(words(), words()) for _ in range(draw.randint(1, 3))]
        asked, said = turns[0]
        pairs = [(r, t) for turn in turns for r, t in zip(("user", "assistant"), turn, strict=True)]
        rows: list[dict[str, Any]] = [
            {"messages": [{"role": r, "content": t} for r, t in pairs]},
            {"conversations": [{"from": r, "value": t} for r, t in pairs]},
            {"instruction": asked, "input": "", "output": said},
            {"prompt": asked, "completion": said},
            {"question": asked, "answer": said},
        ]
        answers = [t for _, t in turns] if number % 5 < 2 else [said]
        by_hand = sum(len(chatml.encode(a.strip(), add_special_tokens=False)) + 1 for a in answers)
        assert encoder.document(record(rows[number % 5])).learned() == by_hand
        total += by_hand
    assert total > 2000


@pytest.mark.parametrize(
    "template", [CHATML, LLAMA3.replace("<|start_header_id|>", "<|im_start|>").replace("<|eot_id|>", "<|im_end|>")]
)
def test_transformers_counts_alike(chatml: Tokenizer, tmp_path: Path, template: str) -> None:
    """Its mask needs {% generation %} in the template; ours does not."""
    transformers = pytest.importorskip("transformers")
    chatml.chat_template = template
    said = "{{ message['content'] }}<|im_end|>"
    marked = "{% if message['role'] == 'assistant' %}{% generation %}SAID{% endgeneration %}{% else %}SAID{% endif %}"
    marked = template.replace(f"{said}\n", f"{said}{{{{ '\\n' }}}}").replace(said, marked.replace("SAID", said))
    chatml.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    found = theirs.apply_chat_template(
        [SYSTEM, *CHAT], chat_template=marked, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    example = Encoder(chatml).conversation([SYSTEM, *CHAT])
    assert example.ids == found["input_ids"]
    assert [int(label != IGNORE) for label in example.labels] == found["assistant_masks"]


def test_llama2_and_alpaca(tokenizers: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(tokenizers["sentencepiece"])
    for template in (LLAMA2, ALPACA):
        tokenizer.chat_template = template
        example = Encoder(tokenizer).conversation([SYSTEM, *CHAT])
        assert learned(example).count(tokenizer.eos_token_id) == 2
        assert "Be brief." in tokenizer.decode(example.ids)
        assert "learn" in tokenizer.decode(learned(example))
        assert "life" not in tokenizer.decode(learned(example))
        # What is asked is cut into tokens as it is when the model answers.
        asked = tokenizer.apply_chat_template([SYSTEM, CHAT[0]])
        assert example.ids[: len(asked)] == asked


def test_an_answer_never_shares_a_token_with_its_question(tokenizers: dict[str, Path]) -> None:
    """A template that ends its prompt within what would be one token of the whole text."""
    tokenizer = load_tokenizer(tokenizers["byte-level"])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q{{ m.content }}the m{% else %}{{ m.content }}{{ eos_token }}"
        "{% endif %}{% endfor %}"
    )
    example = Encoder(tokenizer).conversation(
        [{"role": "user", "content": " "}, {"role": "assistant", "content": "eaning"}]
    )
    joint, asked = (tokenizer.encode(text, False) for text in ("Qthe meaning", "Qthe m"))
    assert joint[: len(asked)] != asked
    assert tokenizer.decode(learned(example)[:-1]) == "eaning"


def test_tools_are_rendered_or_refused(chatml: Tokenizer) -> None:
    row = {
        "messages": [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "Two."},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
    }
    found = record(row)
    with pytest.raises(BadRow, match=r"renders (tools|tool calls).*finetune\.template"):
        Encoder(chatml).document(found)
    chatml.chat_template = TOOLS
    text = chatml.decode(learned(Encoder(chatml).document(found)))
    assert '"name": "add"' in text
    assert "Two." in text
    assert "1+1" not in text


@pytest.mark.parametrize(
    ("template", "error", "why"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", InputError, "never stop"),
        ("{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
         "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", BadRow,
         "the role system"),
        ("{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<|im_end|>{% else %}{{ m.content }}"
         "{% endif %}{% endfor %}{{ messages | length }}", InputError, "prefix"),
        ("{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}\n{% endif %}{% endfor %}", InputError,
         "never stop"),
        ("{{ raise_exception('not for me') if messages[0].role == 'system' }}", BadRow, "not for me"),
    ],
)  # fmt: skip
def test_templates_that_would_mislead(chatml: Tokenizer, template: str, error: type[Exception], why: str) -> None:
    chatml.chat_template = template
    with pytest.raises(error, match=why):
        Encoder(chatml).conversation([SYSTEM, *CHAT])


def test_text_beside_a_call_is_not_lost_unseen(chatml: Tokenizer) -> None:
    """A template that renders a call instead of the text: right for a row without text, wrong for one with it."""
    chatml.chat_template = TOOLS.replace("{{ m.content }}", "{{ '' if m.tool_calls else m.content }}")
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    for texts in (["", "Let me think."], ["Let me think.", ""]):
        encoder = Encoder(chatml)
        for text in texts:
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": text, "tool_calls": [call]}]
            if not text:
                assert encoder.conversation(turns).learned()
                continue
            with pytest.raises(BadRow, match="renders the role assistant"):
                encoder.conversation(turns)


def test_a_template_knows_no_clock(chatml: Tokenizer) -> None:
    """Llama 3.2's writes today's date where it can: a run resumed tomorrow would learn from other tokens."""
    chatml.chat_template = "{% if strftime_now is defined %}{{ strftime_now('%d') }}{% else %}then{% endif %}" + CHATML
    assert chatml.decode(Encoder(chatml).conversation(CHAT).ids).startswith("then")


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_all_of_a_text_is_learned_and_what_it_spells_is_text(tokenizers: dict[str, Path], kind: str) -> None:
    tokenizer = load_tokenizer(tokenizers[kind])
    assert tokenizer.eos_token_id is not None
    text = f"The meaning of life.{tokenizer.token(tokenizer.eos_token_id)}And more."
    example = Encoder(tokenizer).text(text)
    assert example.ids[0] == tokenizer.bos_token_id
    assert example.labels == [IGNORE, *example.ids[1:]]
    assert example.learned() == len(example.ids) - 1
    assert example.ids.count(tokenizer.eos_token_id) == 1
    assert example.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(example.ids[1:-1]) == text


def test_texts_without_bos_or_end(chatml: Tokenizer) -> None:
    example = Encoder(chatml).text("The meaning")
    assert example.ids == [*chatml.encode("The meaning", False), chatml.eos_token_id]
    assert example.labels == [IGNORE, *example.ids[1:]]
    with pytest.raises(InputError, match="would have no end"):
        Encoder(Tokenizer(chatml.backend)).text("The meaning")


def test_a_template_that_refuses_and_one_that_rewrites_what_it_said(chatml: Tokenizer) -> None:
    def encoder(template: str) -> Encoder:
        return Encoder(Tokenizer(chatml.backend, eos_token_id=chatml.eos_token_id, chat_template=template))

    picky = "{% if 'life' in messages[0].content %}{{ raise_exception('not that') }}{% endif %}" + CHATML
    with pytest.raises(BadRow, match=r"is refused by the chat template: .*not that"):
        encoder(picky).conversation(CHAT)
    # The prompt of the second answer is no beginning of the conversation with it, though that one is of the whole.
    forgetful = CHATML.replace(
        "{% if add_generation_prompt %}", "{% if add_generation_prompt %}{{ messages | length }}"
    )
    with pytest.raises(InputError, match=r"cannot be told from the question's \(turn 2\)"):
        encoder(forgetful).conversation(CHAT)
    # A turn is a prefix of the conversation up to it, but not of the whole: how many there are stands in front.
    counting = "{{ messages | length // 3 }}" + CHATML
    with pytest.raises(InputError, match=r"cannot be told from the question's \(turn 2\)"):
        encoder(counting).conversation(CHAT)


def test_packed_examples_hold_every_label_once(tokenizer: Tokenizer) -> None:
    encoder = Encoder(tokenizer)
    units = [(encoder.conversation(CHAT[: 2 * n]),) for n in (1, 2, 1, 1, 2)]
    packed = PackedExamples(units, 128, seed=1, pad=2)
    batch = packed.batch(0, len(packed))
    assert batch.supervised() == sum(e.learned() for unit in units for e in unit)
    assert PackedExamples([*units, (encoder.conversation(CHAT * 20),)], 128, 1, 2).left_out == 1
    pairs = PackedExamples([(a, b) for (a,), (b,) in itertools.pairwise(units)], 256, 1, 2)
    batch = pairs.batch(0, len(pairs))
    assert ((batch.document_ids.amax(1) + 1) % 2 == 0).all()  # both of a pair in one row
    with pytest.raises(InputError, match="the longest needs"):
        PackedExamples(units, 4, 1, 2)


def test_the_mask_is_shown(tokenizer: Tokenizer) -> None:
    example = Encoder(tokenizer).conversation(CHAT)
    plain = shown([example], tokenizer, colour=False)
    assert "⟦To learn.⟧⟦<|eot_id|>⟧" in plain
    assert f"{example.learned()} of {len(example.ids)} tokens are learned" in plain
    assert "\x1b[" in shown([example], tokenizer)


def test_smollm2_by_its_own_template(smollm2: Path, data: Path) -> None:
    """Its GGUF's template, on real conversations."""
    tokenizer = load_tokenizer(smollm2)
    encoder = Encoder(tokenizer)
    for row in json.loads((data / "finetune" / "alpaca_zh_demo.json").read_text(encoding="utf-8"))[:50]:
        answer = tokenizer.encode(row["output"].strip(), add_special_tokens=False, parse_special=False)
        assert encoder.document(record(row)).learned() == len(answer) + 1
