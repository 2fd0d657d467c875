"""The active set as a value: what a job gets after any sequence of set, merge and unmerge."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from photogram.core.request import LoraUse
from photogram.server.active_loras import ActiveLoras, covered, targets_of

from .fake_engine import image_card

ONE = image_card(lora_modules=("transformer", "text_encoder"))
TWO = image_card(lora_modules=("transformer", "transformer_2", "text_encoder"))
ONE_TARGET, TWO_TARGETS = targets_of(ONE), targets_of(TWO)


def use(nickname: str, strength: float = 1.0, target: str = "all") -> LoraUse:
    return LoraUse(nickname=nickname, path=f"/w/{nickname}", strength=strength, target=target)


def test_a_unet_is_the_main_denoiser():
    assert targets_of(image_card(lora_modules=("unet", "text_encoder"))) == ("transformer",)
    assert targets_of(TWO) == ("transformer", "transformer_2")


def test_what_was_set_on_everything_reaches_the_job_as_it_was_set():
    active = ActiveLoras().with_set([use("a", 0.7), use("b", -0.3)], TWO_TARGETS)
    assert active.uses(TWO_TARGETS) == (use("a", 0.7), use("b", -0.3))
    assert [one.nickname for one, _ in active.on_module("text_encoder", TWO)] == ["a", "b"]


def test_a_set_on_one_target_leaves_the_other():
    active = ActiveLoras().with_set([use("a")], TWO_TARGETS).with_set([use("b", 0.5, "transformer_2")], TWO_TARGETS)
    assert active.uses(TWO_TARGETS) == (use("a", target="transformer"), use("b", 0.5, "transformer_2"))
    # The text encoder goes with the whole, which there is no more.
    assert active.on_module("text_encoder", TWO) == []


def test_a_second_set_replaces_the_first():
    active = ActiveLoras().with_set([use("a"), use("b")], ONE_TARGET).with_set([use("c")], ONE_TARGET)
    assert active.uses(ONE_TARGET) == (use("c"),)


def test_a_target_that_the_model_lacks_changes_nothing_that_is_merged():
    active = ActiveLoras().with_set([use("a")], ONE_TARGET).with_set([use("b", target="transformer_2")], ONE_TARGET)
    assert active.uses(ONE_TARGET) == (use("a"),)
    assert [one.use.nickname for one in active.placed] == ["a", "b"]
    assert [one.use.nickname for one in active.with_set([use("c")], ONE_TARGET).placed] == ["c"]


def test_unmerging_and_merging_one_target_of_two():
    active = ActiveLoras().with_set([use("a", 0.7)], TWO_TARGETS).without_merged(("transformer_2",))
    assert active.uses(TWO_TARGETS) == (use("a", 0.7, "transformer"),)
    assert active.on_module("transformer_2", TWO) == [(use("a", 0.7), False)]
    again = active.with_merged(("transformer_2",), 0.2)
    assert again.uses(TWO_TARGETS) == (use("a", 0.7, "transformer"), use("a", 0.2, "transformer_2"))
    assert again.with_merged(TWO_TARGETS, 1.0).uses(TWO_TARGETS) == (use("a", 1.0),)


def test_unmerged_shows_what_is_set_but_gives_jobs_nothing():
    active = ActiveLoras().with_set([use("a", 0.7)], ONE_TARGET).without_merged(ONE_TARGET)
    assert active.uses(ONE_TARGET) == ()
    assert active.on_module("transformer", ONE) == [(use("a", 0.7), False)]
    assert active.on_module("text_encoder", ONE) == [(use("a", 0.7), False)]


_TARGETS = st.sampled_from(["all", "transformer", "transformer_2", "critic"])
_STRENGTHS = st.sampled_from([-0.5, 0.3, 1.0, 1.5])
_USES = st.lists(st.builds(use, st.sampled_from("abc"), _STRENGTHS, _TARGETS), min_size=1, max_size=3)
_CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("set"), _USES),
        st.tuples(st.just("merge"), _TARGETS, _STRENGTHS),
        st.tuples(st.just("unmerge"), _TARGETS),
    ),
    max_size=8,
)


@given(changes=_CHANGES)
def test_every_target_has_what_a_plain_account_of_it_says(changes):
    active = ActiveLoras()
    account = {word: ([], False) for word in TWO_TARGETS}  # word -> ([(nickname, strength)], merged)
    for kind, *arguments in changes:
        if kind == "set":
            (uses,) = arguments
            active = active.with_set(uses, TWO_TARGETS)
            for word in TWO_TARGETS:
                there = [(one.nickname, one.strength) for one in uses if one.target in ("all", word)]
                account[word] = (there, True) if there else account[word]
            continue
        words = covered(arguments[0], TWO_TARGETS)
        if kind == "merge":
            active = active.with_merged(words, arguments[1])
            account |= {word: ([(name, arguments[1]) for name, _ in account[word][0]], True) for word in words}
        else:
            active = active.without_merged(words)
            account |= {word: (account[word][0], False) for word in words}
    for word in TWO_TARGETS:
        uses = [one for one in active.uses(TWO_TARGETS) if one.target in ("all", word)]
        there, merged = account[word]
        assert [(one.nickname, one.strength) for one in uses] == (there if merged else [])
        shown = active.on_module(word, TWO)
        assert [(one.nickname, one.strength) for one, _ in shown] == there
        assert all(is_merged == merged for _, is_merged in shown)
