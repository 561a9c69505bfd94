"""A model under measurement: whole steps, compiled ones included."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from architectures import Maker, configuration, random_model

import zqfp_convert
from zqfp_convert.bench import subject as subject_module
from zqfp_convert.bench.subject import Subject
from zqfp_convert.bench.workload import Workload
from zqfp_convert.errors import OptionError

WORK = Workload(prompts=(12, 20), context=16, new_tokens=5, repeats=1)


def tokens(subject: Subject) -> list[int]:
    """What it writes after its context."""
    with torch.no_grad():
        subject._fill()
        written = []
        for _ in range(WORK.new_tokens):
            subject._advance()
            written.append(int(subject._token))
    return written


def test_writes_what_the_model_writes() -> None:
    model = random_model(configuration("llama"))
    subject = Subject(model, WORK)
    subject.warm_up()
    assert not subject.compiled
    prompt = subject._context
    with torch.no_grad():
        whole = model.generate(
            prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert tokens(subject) == whole[0, 17:].tolist()


def test_caches_stay_where_they_are() -> None:
    subject = Subject(random_model(configuration("llama")), WORK)
    subject.warm_up()
    places = [layer.keys.data_ptr() for layer in subject.cache.layers]
    seconds, queued = subject.decode_seconds()
    assert 0 < queued <= seconds
    assert subject.prefill_seconds(20) > 0
    assert [layer.keys.data_ptr() for layer in subject.cache.layers] == places


def test_steps_compile_whole(converted: Maker) -> None:
    """As on a GPU, but for Inductor: one graph for each length of prompt, one for decoding."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    model = zqfp_convert.load(converted("llama", "best"), "cpu", torch.bfloat16)
    subject = Subject(model, WORK)
    subject.warm_up()
    want = tokens(subject)
    whole = partial(torch.compile, fullgraph=True, backend=backend)
    subject._prefill = whole(subject._last_logits, dynamic=False)
    subject._step = whole(subject._next_token)
    with torch.no_grad():
        subject._rehearse(2)
    assert tokens(subject) == want
    assert len(graphs) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompts": (129,)}, "at most 128"),
        ({"prompts": (0,)}, "1 or more"),
        ({"context": 100, "new_tokens": 29}, "100 \\+ 29"),
        ({"repeats": 0}, "repeats"),
    ],
)
def test_workload_that_does_not_fit(changes: dict[str, int], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Workload.fitting(configuration("llama"), **changes)


def test_usual_workload_of_a_short_model() -> None:
    assert Workload.fitting(configuration("llama")) == Workload((128,), 64, 64, 5)
    long = configuration("llama", max_position_embeddings=131072)
    assert Workload.fitting(long) == Workload()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recipe", ["fast", "best"])
def test_early_launches_change_nothing(
    recipe: str, converted: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels that start before the one ahead has ended write what they write one by one."""
    written = []
    for early in (True, False):
        torch._dynamo.reset()
        if not early:
            monkeypatch.setattr(subject_module, "_early_launches", dict)
        model = zqfp_convert.load(converted("llama", recipe), device="cuda", dtype=torch.bfloat16)
        subject = Subject(model, WORK)
        subject.warm_up()
        assert subject.compiled
        written.append([tokens(subject) for _ in range(5)])
        subject.cache.reset()
        logits = subject._last_logits(subject._context, subject.cache)
        assert logits.isfinite().all()
    assert written[0] == written[1]
