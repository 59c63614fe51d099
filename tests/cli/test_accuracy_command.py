"""`maveriq accuracy` and `maveriq fingerprint`: commands on the files of small models."""

import csv
import json
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from command_results import Maveriq

from maveriq.domain.models import KvType, WeightType
from maveriq.estimate.hardware_profile import read_accuracy
from maveriq.profiling.questions import prompt_of, read_questions

QUESTIONS = [(f"What is {left} + {right}?", left, right, left + right, 7, "ABCD"[(left * right) % 4])
             for left in range(1, 6) for right in range(1, 5)]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random llama whose tokens are bytes, and questions."""
    folder = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3,
        vocab_size=256, max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(3)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "small")
    config.num_hidden_layers = 4
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "larger")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({token: at for at, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "small/tokenizer.json"))
    with (folder / "sums_test.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(QUESTIONS)
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    return folder


def test_answers_in_16_bits_are_those_of_transformers(maveriq: Maveriq, model: Path) -> None:
    ended = maveriq(f"accuracy {model}/small --questions {model}/sums_test.csv --formats int8,int4 --out t.csv --json")
    assert ended.code == 0, ended.err
    rows = json.loads(ended.out)["formats"]
    assert [(row["weights"], row["samples"]) for row in rows] == [("float16", "20"), ("int8", "20"), ("int4", "20")]
    reference = transformers.AutoModelForCausalLM.from_pretrained(model / "small").eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "small/tokenizer.json"))
    right = 0
    for question in read_questions(model / "sums_test.csv"):
        with torch.no_grad():
            logits = reference(torch.tensor([tokenizer.encode(prompt_of(question)).ids])).logits[0, -1]
        letters = [tokenizer.encode(letter).ids[-1] for letter in "ABCD"]
        right += int(logits[letters].argmax()) == question.answer
    assert float(rows[0]["score"]) == pytest.approx(right / 20, abs=1e-4)
    assert read_accuracy(Path("t.csv"))["small", WeightType.FLOAT16, KvType.NATIVE] == 100.0
    assert read_accuracy(Path("t.csv"))["small", WeightType.INT4, KvType.NATIVE] == float(rows[2]["percent"])


def test_a_texts_perplexity_is_that_of_transformers_and_int4_costs_more_than_int8(
    maveriq: Maveriq, model: Path
) -> None:
    command = f"accuracy {model}/small --text {model}/text.txt --context-tokens 32 --limit 40 --formats int4,int8"
    ended = maveriq(f"{command} --out t.csv --json")
    assert ended.code == 0, ended.err
    float16, int4, int8 = json.loads(ended.out)["formats"]
    reference = transformers.AutoModelForCausalLM.from_pretrained(model / "small").eval()
    tokens = (
        tokenizers.Tokenizer.from_file(str(model / "small/tokenizer.json")).encode((model / "text.txt").read_text()).ids
    )
    places = [32 + place * (len(tokens) - 32) // 40 for place in range(40)]
    with torch.no_grad():
        logits = reference(torch.tensor([tokens[place - 32 : place] for place in places])).logits[:, -1].log_softmax(-1)
    found = torch.exp(-logits[range(40), [tokens[place] for place in places]].mean())
    assert float(float16["score"]) == pytest.approx(float(found), rel=1e-3)
    distance = [abs(float(row["score"]) / float(float16["score"]) - 1) for row in (int8, int4)]
    assert 0 < distance[0] < distance[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--formats int8", "give either --questions or --text"),
        ("--questions none.csv --formats int8", "does not exist"),
        ("--questions {0}/sums_test.csv --formats int5", "--formats 'int5' is none"),
        ("--questions {0}/sums_test.csv --formats int4_gptq", "int4_gptq"),
        ("--questions {0}/sums_test.csv --formats int8 --examples {0}/text.txt", "a question has 6 cells"),
        ("--text {0}/text.txt --formats int8 --context-tokens 9000", "too few for contexts of 9000"),
        ("--text {0}/text.txt --formats int8 --backend trtllm", "other engines tell no scores"),
        ("--text {0}/text.txt --formats int8 --checkpoint int8={0}", "write WEIGHTS=FOLDER"),
        ("--text {0}/text.txt --formats int8 --checkpoint int8={0}/larger", "another model: layers 3, not 4"),
    ],
)
def test_bad_input_is_one_line(options: str, message: str, maveriq: Maveriq, model: Path) -> None:
    ended = maveriq(f"accuracy {model}/small --out t.csv {options.format(model)}")
    assert ended.code == 2
    assert message in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert not Path("t.csv").exists()


def test_a_model_without_weights_has_no_accuracy(maveriq: Maveriq, model: Path) -> None:
    ended = maveriq(f"accuracy llama-2-7b --out t.csv --formats int8 --text {model}/text.txt")
    assert (ended.code, "has no weights" in ended.err) == (2, True)


def test_a_fingerprint_of_a_folder(maveriq: Maveriq, model: Path) -> None:
    ended = maveriq(f"fingerprint {model}/small --layers 1 --out mine")
    assert ended.code == 0, ended.err
    assert "3 of 3: full attention" in ended.out
    assert "the whole model's weights" in ended.out
    found = json.loads(maveriq(f"fingerprint {model}/small --layers 2 --out mine --overwrite --json").out)
    assert [layer["stands_for"] for layer in found["layers"]] == [2, 1]
    assert found["full_bytes"] > found["weight_bytes"] > found["extra_bytes"]
    ended = maveriq(f"fingerprint {model}/small --layers 2 --out mine")
    assert (ended.code, "exists already" in ended.err) == (2, True)
    ended = maveriq(f"fingerprint {model}/small --layers 4 --out other")
    assert (ended.code, "has 3 layers; --layers must be at most that, not 4" in ended.err) == (2, True)
    ended = maveriq("fingerprint no-such-model --layers 1 --out other")
    assert (ended.code, "no-such-model" in ended.err, Path("other").exists()) == (2, True, False)
