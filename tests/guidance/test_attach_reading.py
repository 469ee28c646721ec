"""What the rules of attaching rely on in the source of diffusers' pipelines, read from the installed
release."""

from __future__ import annotations

import ast
import inspect
import logging
import textwrap
from collections.abc import Iterator

import diffusers
import pytest

from selfnpo_fast.guidance.attached import LAST_METHOD
from selfnpo_fast.guidance.pipelines import say_unread_release
from selfnpo_fast.models import FAMILIES
from selfnpo_fast.models.call_rules import READ_RELEASES, Branch, OneCall, TwoCalls
from selfnpo_fast.runtime import console

CLASSES = {name: family for family in FAMILIES.values() for name in family.guided_pipelines}


def source_of(name: str) -> str:
    return textwrap.dedent(inspect.getsource(inspect.unwrap(getattr(diffusers, name).__call__)))


class Reader:
    """The `__call__` of a pipeline class, against its family's rule."""

    def __init__(self, source: str, family) -> None:
        self.tree, self.family, self.rule = ast.parse(source), family, family.call_rule
        self.texts = {ast.unparse(node) for node in ast.walk(self.tree)}
        self.parents = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}
        self.known = {f"self.{name}" for name in family.denoiser_names}
        self.assigned: dict[str, list[ast.expr]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self.assigned.setdefault(ast.unparse(target), []).append(node.value)

    def denoiser_calls(self) -> list[ast.Call]:
        """The calls of a denoiser, in the order of the source."""
        own = {
            name for name, values in self.assigned.items() if any(ast.unparse(value) in self.known for value in values)
        }
        calls = [node for node in ast.walk(self.tree) if isinstance(node, ast.Call)]
        found = [call for call in calls if ast.unparse(call.func) in self.known | own]
        return sorted(found, key=lambda call: call.lineno)

    def outward(self, node: ast.AST) -> Iterator[ast.AST]:
        while (node := self.parents.get(node)) is not None:
            yield node

    def problems(self) -> list[str]:
        """What is not as the rule needs it."""
        found = []
        for method in (self.family.first_method, LAST_METHOD):
            if not any(text.startswith(f"self.{method}(") for text in self.texts):
                found.append(f"{method} is not called")
        guided = self.rule.guided_local or "self.do_classifier_free_guidance"
        if self.rule.guided_local is not None and guided not in self.assigned:
            found.append(f"no local {guided}")
        if guided not in self.texts:
            found.append(f"{guided} is not asked")
        return found + (self.one_call(guided) if isinstance(self.rule, OneCall) else self.two_calls(guided))

    def one_call(self, guided: str) -> list[str]:
        argument = self.rule.positive_argument
        both = [call for call in self.denoiser_calls() if argument not in {word.arg for word in call.keywords}]
        further = len(self.denoiser_calls()) - len(both)
        found = [] if len(both) == 1 and further <= 1 else [f"{len(both)} and {further} calls of the denoiser"]
        if self.rule.half is Branch.FIRST_HALF:
            pairs = [target for target, values in self.assigned.items() if self.is_chunk(values)]
            ordered = [["uncond" in name for name in pair.split(",")] == [True, False] for pair in pairs]
            if not ordered or not all(ordered):
                found.append("the first half is not the negative one")
            if not any(text.startswith("torch.cat([negative_prompt_embeds, prompt_embeds]") for text in self.texts):
                found.append("the texts are stacked in another order")
        else:
            if "prompt_embeds + negative_prompt_embeds" not in self.texts:
                found.append("the texts are stacked in another order")
            halves = {"pos_out": "model_out_list[:actual_batch_size]", "neg_out": "model_out_list[actual_batch_size:]"}
            if any(
                [ast.unparse(value) for value in self.assigned.get(name, [])] != [half] for name, half in halves.items()
            ):
                found.append("the last half is not the negative one")
        return found

    @staticmethod
    def is_chunk(values: list[ast.expr]) -> bool:
        return any(ast.unparse(value).endswith(".chunk(2)") and "noise_pred" in ast.unparse(value) for value in values)

    def two_calls(self, guided: str) -> list[str]:
        rule, calls = self.rule, self.denoiser_calls()
        texts = [[ast.unparse(w.value) for w in call.keywords if w.arg == rule.text_argument] for call in calls]
        if texts != [[rule.prompt_local], [rule.negative_local]]:
            return [f"the denoiser is called with {texts}"]
        found = []
        conditions = [
            [ast.unparse(node.test) for node in self.outward(call) if isinstance(node, ast.If)] for call in calls
        ]
        if guided in conditions[0] or guided not in conditions[1]:
            found.append("the negative call is not the one that only guidance makes")
        contexts = [self.context(call) for call in calls]
        if contexts not in (["cond", "uncond"], [None, None]):
            found.append(f"the calls are in the contexts {contexts}")
        if rule.given_local is not None and rule.given_local not in self.assigned:
            found.append(f"no local {rule.given_local}")
        arguments = {argument.arg for argument in ast.walk(self.tree) if isinstance(argument, ast.arg)}
        if rule.scale_local is not None and rule.scale_local not in arguments:
            found.append(f"no argument {rule.scale_local}")
        return found

    def context(self, call: ast.Call) -> str | None:
        """The name of the cache_context around a call."""
        for node in self.outward(call):
            for item in node.items if isinstance(node, ast.With) else ():
                entered = item.context_expr
                if isinstance(entered, ast.Call) and ast.unparse(entered.func).endswith(".cache_context"):
                    return ast.literal_eval(entered.args[0])
        return None


@pytest.mark.parametrize("name", CLASSES)
def test_the_installed_release_calls_its_denoiser_as_the_rule_says(name):
    assert not Reader(source_of(name), CLASSES[name]).problems()
    rule = CLASSES[name].call_rule
    if rule.guided_local is None:
        assert isinstance(inspect.getattr_static(getattr(diffusers, name), "do_classifier_free_guidance"), property)


@pytest.mark.parametrize(
    ("name", "old", "new", "problem"),
    [
        ("LTXPipeline", "[negative_prompt_embeds, prompt_embeds]", "[prompt_embeds, negative_prompt_embeds]", "order"),
        ("LTXPipeline", "noise_pred_uncond, noise_pred_text =", "noise_pred_text, noise_pred_uncond =", "first half"),
        ("LTXPipeline", "self.do_classifier_free_guidance", "self.guides", "is not asked"),
        ("LTXPipeline", "self.check_inputs(", "self.check(", "check_inputs is not called"),
        ("CogVideoXPipeline", "do_classifier_free_guidance", "guides", "no local"),
        ("CogVideoXPipeline", "noise_pred = noise_pred.float()", "self.transformer(latents)", "2 and 0 calls"),
        ("StableDiffusion3Pipeline", "skip_layers=skip_guidance_layers", "skipped=1", "2 and 0 calls"),
        ("ZImagePipeline", "prompt_embeds + negative_prompt_embeds", "negative_prompt_embeds + prompt_embeds", "order"),
        ("ZImagePipeline", "[:actual_batch_size]", "[actual_batch_size:]", "last half"),
        (
            "WanPipeline",
            "encoder_hidden_states=negative_prompt_embeds",
            "encoder_hidden_states=other",
            "is called with",
        ),
        ("WanPipeline", 'cache_context("uncond"', 'cache_context("negative"', "contexts"),
        ("FluxPipeline", "if do_true_cfg:", "if True:", "only guidance"),
        ("FluxPipeline", "has_neg_prompt", "has_negative", "no local"),
        ("QwenImagePipeline", "true_cfg_scale", "cfg_scale", "no argument"),
    ],
)
def test_a_release_that_changes_it_is_found(name, old, new, problem):
    source = source_of(name)
    assert old in source
    problems = Reader(source.replace(old, new), CLASSES[name]).problems()
    assert any(problem in found for found in problems), problems


def test_two_rules_serve_all_classes():
    assert {type(family.call_rule) for family in CLASSES.values()} == {OneCall, TwoCalls}
    assert diffusers.__version__ in READ_RELEASES


def test_a_release_that_was_not_read_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(console, "_said", set(), raising=False)
    with caplog.at_level(logging.WARNING, logger="selfnpo"):
        say_unread_release()
        assert not caplog.records
        monkeypatch.setattr(diffusers, "__version__", "0.99.0")
        say_unread_release()
        say_unread_release()
    (record,) = caplog.records
    assert "diffusers 0.99.0: its pipelines were read in 0.42.1" in record.getMessage()
