"""Greedy tokens of a split model equal those of the unsplit one of transformers."""

import pytest

pytest.importorskip("torch", reason="the torch engine needs maveriq[torch]")
pytest.importorskip("transformers", reason="the expected tokens come from transformers")

from torch_models import CONFIGS, LAYERS, PROMPTS, expected_tokens, load_worker, outputs, prompts_of, run_split, spec_of


def compositions(total):
    """Return all splits of the layers into stages."""
    yield (total,)
    for first in range(1, total):
        yield from ((first, *rest) for rest in compositions(total - first))


@pytest.mark.parametrize("tp", [1, 2, pytest.param(4, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_split_gives_the_tokens_of_the_unsplit_model(name, tp):
    for split in compositions(LAYERS):
        for rank, steps in enumerate(run_split(spec_of(CONFIGS[name], tp=tp, split=split), prompts_of())):
            assert outputs(steps) == expected_tokens(name), (split, rank)


def test_the_expected_tokens_are_diverse():
    for name in CONFIGS:
        expected = expected_tokens(name)
        assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS), name
        assert len({token for tokens in expected for token in tokens}) > len(PROMPTS), name


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_gives_the_tokens_of_each_prompt_alone_in_any_order(name):
    worker = load_worker(spec_of(CONFIGS[name]))
    prompts = prompts_of()
    for chosen in ([0], [1], [2], [1, 0], [2, 0, 1]):
        steps = [step for step, _ in worker.run(tuple(prompts[n] for n in chosen))]
        assert outputs(steps) == [expected_tokens(name)[n] for n in chosen]


def test_a_sequence_ends_at_its_stop_token_and_the_others_continue():
    expected = expected_tokens("llama")
    stop = expected[0][3]
    ends = [tokens.index(stop) + 1 if stop in tokens else len(tokens) for tokens in expected]
    worker = load_worker(spec_of(CONFIGS["llama"]))
    steps = list(worker.run(prompts_of(stop=[stop])))
    assert outputs([step for step, _ in steps]) == [tokens[:end] for tokens, end in zip(expected, ends, strict=True)]
    assert [last for _, last in steps] == [False] * (max(ends) - 1) + [True]
    assert len(steps) == max(ends)


def test_sequences_may_have_different_numbers_of_tokens():
    short, long = prompts_of(PROMPTS[:1], output_tokens=1)[0], prompts_of(PROMPTS[1:2], output_tokens=8)[0]
    worker = load_worker(spec_of(CONFIGS["falcon-7b"]))
    expected = expected_tokens("falcon-7b")
    steps = [step for step, _ in worker.run((short, long))]
    assert outputs(steps) == [expected[0][:1], expected[1][:8]]
    assert all(step[0] == -1 for step in steps[1:])


def test_a_prompt_of_one_token():
    worker = load_worker(spec_of(CONFIGS["gpt-j"]))
    alone = [step for step, _ in worker.run(prompts_of([(3,)]))]
    together = [step for step, _ in worker.run(prompts_of([(3,), PROMPTS[0]]))]
    assert outputs(together)[0] == outputs(alone)[0]
    assert outputs(together)[1] == expected_tokens("gpt-j")[0]
