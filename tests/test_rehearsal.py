"""--dry-run: it does everything that a run does, tells what the run will take, and leaves nothing behind."""

import re
from pathlib import Path

import pytest
import torch

from tests.faults import write_config
from tests.test_scripts import run

SCRIPT = "cross_teacher_contr.py"


def everything_below(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns if path.is_file() else 0 for path in sorted(folder.rglob("*"))}


@pytest.mark.slow
@pytest.mark.parametrize("start", [0, 4])
def test_a_dry_run_tells_what_the_run_will_take_and_writes_nothing(demo: Path, tmp_path: Path, start: int):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    contrast = {"training__contrastive__contrast_start": 5, "training__unlabeled__start_iteration": start}
    cache = {"training__data__cache": "disk", "training__data__cache_dir": str(tmp_path / "cache")}
    config = write_config(tmp_path, demo, **contrast, **cache)
    before = everything_below(tmp_path), everything_below(demo)
    environment = {"TMPDIR": str(scratch), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path.parent)}  # torch makes it at import
    done = run(SCRIPT, "--config", config, "--name", "try", "--dry-run", env=environment)
    assert done.returncode == 0, done.stderr
    assert (everything_below(tmp_path), everything_below(demo)) == before
    lines = dict(re.split(r" {2,}", line, maxsplit=1) for line in done.stdout.splitlines()[1:])
    assert re.fullmatch(r"\d+\.\d\d hours", lines["estimated time"])
    assert ("(supervised, 4 steps)" in lines["a step"]) == (start == 4)
    assert f"(supervised + cross_teacher, {5 - start} steps)" in lines["a step"]
    assert "(supervised + cross_teacher + high_level + low_level, 3 steps)" in lines["a step"]
    assert "for 3 images" in lines["a validation"]
    assert float(lines["peak memory"].split()[0]) > 0


@pytest.mark.slow
def test_a_dry_run_finds_what_a_run_would_stumble_over(demo: Path, tmp_path: Path):
    config = write_config(tmp_path, demo, pretrained=str(tmp_path / "nowhere.pth"))
    done = run(SCRIPT, "--config", config, "--name", "try", "--dry-run")
    assert done.returncode == 5
    assert "nowhere.pth" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_steps_of_every_kind_are_taken_and_counted(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, weight: float
):
    from tests.test_trainer import build
    from utils.config import load_config
    from utils.rehearsal import rehearse

    settings = {"start_iteration": 2, "consistency_weight": weight}
    contrast = {"training__contrastive__contrast_start": 4}
    settings = {f"training__unlabeled__{key}": value for key, value in settings.items()} | contrast
    trainer = build(load_config(write_config(tmp_path, demo, **settings)))
    seen = []
    step_of = trainer.method.training_step
    monkeypatch.setattr(
        trainer.method, "training_step", lambda *args, **more: seen.append(step_of(*args, **more)) or seen[-1]
    )
    rehearse(trainer, images=3, evaluate_first=lambda count: trainer.evaluate(0, iter))
    terms = [{term for term, _ in names} for names in seen]
    assert terms[0] == {"supervised"}
    assert terms[-1] == {"supervised", *(["cross_teacher"] if weight else []), "high_level", "low_level"}
    told = [int(steps) for steps in re.findall(r", (\d+) steps\)", capsys.readouterr().out)]
    assert sum(told) == trainer.config.training.num_iterations, "also where two stretches have the same terms"
    assert len(told) == 3
    assert all(torch.isfinite(p).all() for p in trainer.method.parameters())
