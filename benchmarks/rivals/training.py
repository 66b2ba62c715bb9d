"""Makes and trains the models of the comparison, each step of the way once: everything is kept on disk and resumed.

Trained with the project's own loop, so data order, losses and learning rate are those of ``actvar distill``. A model
is stored after its start, after stage 1 and after stage 2; a later level goes on from an earlier one, which gives what
both stages in one run give.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from actvar_convert.distillation.data import Making, TokenStore, store_from_images, store_from_teacher
from actvar_convert.distillation.loop import Upkeep, distill_model
from actvar_convert.distillation.stages import STAGES
from actvar_convert.files.run_state import RunState, fingerprint_of, load_run_state, save_run_state
from actvar_convert.models.fingerprint import state_fingerprint
from actvar_convert.models.model import Model
from actvar_convert.recipe.schema import Recipe
from actvar_convert.stores import require_images
from actvar_convert.system.progress import MetricsLog, Progress, SilentProgress
from rivals.method import CODE, Built, Level, Method

LEVELS: tuple[Level, ...] = ("none", "stage1", "full")
"""In the order of training."""

START = ("seed", "calibration", "experts", "gate", "budget", "plans", "default_plan")
"""Sections of a recipe that a model without training depends on, beside the guidance of the teacher's samples."""


class Workshop:
    """Models of one teacher, in one folder.

    Args:
        teacher: the dense model.
        folder: where weights, unfinished trainings and the teacher's pyramids are kept.
        progress: told about every long step.
    """

    def __init__(self, teacher: Model, folder: Path, progress: Progress | None = None) -> None:
        self.teacher, self.folder = teacher, folder
        self.progress = progress or SilentProgress()
        self.teacher_print = state_fingerprint(teacher)
        self._stores: dict[str, TokenStore] = {}

    def keys(self, method: Method, recipe: Recipe, cut: float) -> dict[Level, str]:
        """What identifies a method's weights at each level: all that they depend on."""
        sections = recipe.model_dump(mode="json")
        shape = self.teacher.config.model_dump()
        start = {name: sections[name] for name in START}
        fixed = [CODE, self.teacher_print, str(self.teacher.dtype), _text(shape), method.name, str(cut)]
        none = fingerprint_of(*fixed, _text({**start, "cfg": recipe.data.cfg}))
        trained = {"data": sections["data"], "dtype": recipe.dtype, "stage": sections["distill"]["stage1"]}
        trained["plans"] = recipe.distill.plans
        stage1 = fingerprint_of(none, _text(trained))
        full = fingerprint_of(stage1, _text(sections["distill"]["stage2"]))
        return {"none": none, "stage1": stage1, "full": full}

    def make(self, method: Method, recipe: Recipe, cut: float, level: Level) -> Built:
        """The model of a method at a cut, trained up to a level.

        Args:
            recipe: as ``method.recipe`` returned it.

        Raises:
            OutOfReach: the method cannot save so much.
            Interrupted: after Ctrl-C; the same call goes on.
        """
        keys = self.keys(method, recipe, cut)
        wanted = LEVELS[: LEVELS.index(level) + 1]
        stored = [each for each in wanted if self.path(keys[each]).exists()]
        if stored:
            state = load_run_state(self.path(keys[stored[-1]]), keys[stored[-1]])
            built = method.build(self.teacher, recipe, cut, self.progress, state.scalars)
            built.student.transformer.load_state_dict(state.tensors)
        else:
            built = method.build(self.teacher, recipe, cut, self.progress, None)
            if method.calibrated:
                self._keep(built, keys["none"])
        for each in wanted[1 + (wanted.index(stored[-1]) if stored else 0) :]:
            if getattr(recipe.distill, _stage(each)).steps:
                self._train(built, recipe, each, keys[each])
                self._keep(built, keys[each])
                self._unfinished(keys[each]).unlink(missing_ok=True)
        built.student.eval()
        return built

    def _keep(self, built: Built, key: str) -> None:
        self.path(key).parent.mkdir(parents=True, exist_ok=True)
        save_run_state(self.path(key), RunState(built.student.transformer.state_dict(), built.found, key))

    def path(self, key: str) -> Path:
        """Where weights are kept."""
        return self.folder / "models" / f"{key[:32]}.safetensors"

    def _unfinished(self, key: str) -> Path:
        return self.path(key).with_suffix(".state.safetensors")

    def _train(self, built: Built, recipe: Recipe, level: Level, key: str) -> None:
        """Runs one stage, going on where it was stopped."""
        other = "stage2" if _stage(level) == "stage1" else "stage1"
        # unchecked: one stage alone need not be a recipe, as where guidance is folded in, which stage 2 has to teach
        skipped = getattr(recipe.distill, other).model_copy(update={"steps": 0})
        alone = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={other: skipped})})
        store = self.store(recipe)
        with MetricsLog(self.path(key).with_suffix(".jsonl")) as log:
            distill_model(
                built.student,
                self.teacher,
                alone,
                store,
                Upkeep(self.progress, log, self._unfinished(key), key),
                stages=[(STAGES["stage1"], alone.distill.stage1), (built.joint, alone.distill.stage2)],
            )

    def store(self, recipe: Recipe) -> TokenStore:
        """The pyramids that everything is trained on, made once."""
        data, seed = recipe.data, recipe.seed + 2
        settings = {**data.model_dump(mode="json", exclude={"null_share"}), "seed": seed}
        key = fingerprint_of(self.teacher_print, _text(settings))[:32]
        if key not in self._stores:
            path = self.folder / f"tokens-{key}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            making = Making(data.batch, seed, self.progress, path)
            images = require_images(recipe, self.teacher.family.classes(self.teacher.config), self.progress)
            if images is not None:
                self._stores[key] = store_from_images(self.teacher, images.training, making)
            else:
                self._stores[key] = store_from_teacher(self.teacher, data.pyramids, making, cfg=data.cfg)
        return self._stores[key]


def _stage(level: Level) -> str:
    """The stage of a recipe that leads to a level."""
    return "stage1" if level == "stage1" else "stage2"


def _text(settings: Mapping[str, object]) -> str:
    return json.dumps(settings, sort_keys=True)
