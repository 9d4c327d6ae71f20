"""``rtap calibrate``: what it fits from samples, its file, its sentences for wrong input, and sampling of a server."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rtap_core.artifact import Logistic, read_artifact_file
from rtap_core.features import LogprobFeatures
from rtap_training.evaluation import client
from rtap_training.evaluation.calibrate import main
from rtap_training.evaluation.fitting import Served, fit
from rtap_training.evaluation.records import CycleRecord, Load, Outcome

TRUTH = Logistic(bias=-4.0, probability_mean=2.0, probability_answer=5.0)


def features(rng: np.random.Generator) -> LogprobFeatures:
    mean, answer = -rng.exponential(0.3), -rng.exponential(0.5)
    return LogprobFeatures(mean, mean * 9, mean * 4, answer, int(rng.integers(20, 200)))


def rows(questions: int = 60, samples: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """Samples whose correctness follows TRUTH, with a confidence that is too high by a logit of 2."""
    rng = np.random.default_rng(seed)
    found = list[dict[str, Any]]()
    for question in range(questions):
        for number in range(samples):
            known = features(rng)
            share = TRUTH.confidence(None, known)
            found.append({
                "question": f"q{question}", "reference": "1", "sample": number, "answer": "1", "text": "1", "tokens": 9,
                "is_correct": bool(rng.random() < share), "logprobs": known.shown(), "kind": "logprob",
                "confidence": Logistic(bias=2.0, generator=1.0).confidence(share, None),
            })  # fmt: skip
    return found


def samples(**without: None) -> list[tuple[str, CycleRecord]]:
    return [
        (row["question"], CycleRecord("1", row["is_correct"], row["confidence"], logprobs=row["logprobs"]))
        for row in [one | without for one in rows()]
    ]


def written(path: Path, content: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def test_log_probability_features_become_probabilities() -> None:
    block, report = fit(Served("logprob", samples()))
    logistic = Logistic(**block["logistic"])
    rng = np.random.default_rng(9)
    unseen = [features(rng) for _ in range(500)]
    gaps = [abs(logistic.confidence(None, one) - TRUTH.confidence(None, one)) for one in unseen]
    assert np.mean(gaps) < 0.06
    judged = block["calibration"]["held_out"]
    assert judged["within_auroc"] > 0.7
    assert judged["ece"] < 0.08
    low, high = judged["intervals"]["within_auroc"]
    assert low < judged["within_auroc"] < high
    assert 0.2 < block["threshold"] < 0.8
    assert sum(block["calibration"]["reference"]) == pytest.approx(1, abs=1e-3)
    assert "480 samples of 60 questions" in report
    assert "probability_answer" in report


@pytest.mark.parametrize("served", [None, {"bias": 0.5, "generator": 2.0, "logprob_mean": 0.1}])
def test_other_kinds_get_a_platt_calibration_after_the_servers_own(served: dict[str, float] | None) -> None:
    block, report = fit(Served("yesno", samples(logprobs=None), served))
    logistic = Logistic(**block["logistic"])
    first = Logistic(bias=0.0, generator=1.0) if served is None else Logistic(**served)
    assert logistic.generator / first.generator == pytest.approx(1.0, abs=0.15)  # the slope
    assert logistic.bias - first.bias == pytest.approx(-2.0, abs=0.5)  # the offset
    assert logistic.logprob_mean == pytest.approx(first.logprob_mean * logistic.generator / first.generator, abs=1e-3)
    assert block["source"] == "yesno"
    before, after = (float(line[52:58]) for line in report.splitlines()[2:4])
    assert after < 0.08 < 0.2 < before


def test_the_file_is_the_servers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, output = written(tmp_path / "samples.jsonl", rows()), tmp_path / "confidence.json"
    assert main(["--from-samples", str(kept), "--output", str(output)]) == 0
    artifact = read_artifact_file(output)
    assert artifact.is_calibrated
    assert (artifact.source, artifact.logistic is not None and artifact.logistic.reads_logprobs) == ("logprob", True)
    assert f"wrote {output}" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("samples.jsonl", "confidence.json")] == []


def test_only_the_wanted_half_of_the_questions_is_fitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, shown = written(tmp_path / "samples.jsonl", rows()), list[int]()
    for split in ("calibration", "test"):
        assert main(["--from-samples", str(kept), "--output", str(tmp_path / "c.json"), "--split", split]) == 0
        shown.append(int(capsys.readouterr().out.split(" samples of ")[1].split()[0]))
    assert sum(shown) == 60
    assert min(shown) > 15


RIGHT = [row | {"is_correct": True} for row in rows()]
UNSCORED = [row | {"logprobs": None, "confidence": None, "kind": None} for row in rows()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "has no samples with an answer"),
        ([{"question": "q"}], r"samples.jsonl:1: not a sample \(KeyError"),
        ([7], r"samples.jsonl:1: not a sample"),
        ([rows()[0] | {"confidence": 7}], "confidence 7 is not between 0 and 1"),
        (RIGHT, "all 480 samples are right, so nothing separates them; give harder questions"),
        ([row | {"is_correct": False} for row in rows()], "give easier questions"),
        (rows(questions=4), "of 4 questions are too few; give at least 10 questions"),
        (UNSCORED, "none of the 480 samples has a confidence"),
        ([row | {"logprobs": {"mean": "x"}} for row in rows()], "the samples hold wrong features"),
        ([row | {"logprobs": row["logprobs"] | {"mean": float("nan")}} for row in rows()], "wrong features"),
    ],
)  # fmt: skip
def test_what_cannot_be_fitted_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: list[Any], message: str
) -> None:
    kept, output = written(tmp_path / "samples.jsonl", content), tmp_path / "confidence.json"
    assert main(["--from-samples", str(kept), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("rtap calibrate: ")
    assert re.search(message, error)
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no questions: give --questions FILE"),
        (["--questions", "absent.jsonl"], "absent.jsonl"),
        (["M", "--server", "http://x"], "give only one of them"),
        (["--from-samples", "s.jsonl", "--questions", "q.jsonl"], "has its own questions"),
        (["--from-samples", "s.jsonl", "--", "--max-model-len", "9"], "needs no server"),
        (["--questions", "{questions}", "--output", "/proc/no/c.json"], "cannot write /proc/no: "),
        (["--from-samples", "absent.jsonl"], "cannot read the samples file absent.jsonl: No such file"),
        (["--questions", "{questions}", "--server", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9"),
    ],
)
def test_missing_input_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    questions = written(tmp_path / "q.jsonl", [{"question": "1+1", "answer": "2"}])
    assert main([one.replace("{questions}", str(questions)) for one in arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_server_is_sampled_one_scored_cycle_a_request_and_the_samples_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of the samples gives the same calibration again."""
    known = iter(rows(questions=40, samples=4))
    asked = list[tuple[Any, int]]()

    async def connect(server: client.RtapServer) -> client.RtapServer:
        server.config = {"confidence": {"kind": "logprob", "logistic": None}}
        return server

    async def ask(_: Any, questions: Any, spec: Any, load: Load, *, on_outcome: Any) -> tuple[list[Outcome], float]:
        asked.append((spec.request(load), load.seed))
        outcomes = list[Outcome]()
        for index in range(len(questions)):
            row = next(known)
            answer = "1" if row["is_correct"] else "2"
            cycle = CycleRecord(answer, False, row["confidence"], 9, text=answer, logprobs=row["logprobs"])
            outcomes.append(Outcome(index, cycles=(cycle,)))
            on_outcome(outcomes[-1])
        return outcomes, 1.0

    monkeypatch.setattr(client.RtapServer, "connect", connect)
    monkeypatch.setattr(client.RtapServer, "ask", ask)
    questions = written(tmp_path / "sums.jsonl", [{"question": f"q{i}", "answer": "1"} for i in range(40)])
    output, again = tmp_path / "confidence.json", tmp_path / "again.json"
    flags = ["--server", "http://x", "--questions", str(questions), "--samples", "4", "--seed", "3"]
    assert main([*flags, "--output", str(output)]) == 0
    one_cycle = {"policy": "confidence", "threshold": 1.0, "max_cycles": 1}
    assert asked == [(one_cycle, seed) for seed in (3, 4, 5, 6)]
    assert main(["--from-samples", str(tmp_path / "confidence.samples.jsonl"), "--output", str(again)]) == 0
    assert read_artifact_file(output) == read_artifact_file(again)


def test_a_server_without_confidence_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def connect(server: client.RtapServer) -> client.RtapServer:
        server.config = {"confidence": {"kind": "none"}}
        return server

    monkeypatch.setattr(client.RtapServer, "connect", connect)
    questions = written(tmp_path / "q.jsonl", [{"question": "1+1", "answer": "2"}])
    assert main(["--server", "http://x", "--questions", str(questions), "--output", str(tmp_path / "c.json")]) == 2


def test_without_flags_of_the_server_its_confidence_is_logprob(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands = list[list[str]]()

    def running(command: list[str], **_: Any):
        commands.append(command)
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "running_server", running)
    questions = written(tmp_path / "q.jsonl", [{"question": "1+1", "answer": "2"}])
    flags = ["M", "--questions", str(questions), "--output", str(tmp_path / "c.json")]
    for more in ([], ["--", "--max-model-len", "9"], ["--", "--confidence", "yesno"], ["--confidence-model=G"]):
        assert main([*flags, *more]) == 130
    assert [command[-4:].count("logprob") for command in commands] == [1, 1, 0, 0]


def test_kept_scores_of_a_calibrated_generator_keep_its_calibration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = {"bias": 0.5, "generator": 2.0}
    scored = [one | {"logprobs": None, "kind": "pooling", "logistic": first} for one in rows()]
    output = tmp_path / "c.json"
    assert main(["--from-samples", str(written(tmp_path / "s.jsonl", scored)), "--output", str(output)]) == 0
    found = read_artifact_file(output)
    assert found.source == "pooling"
    assert found.logistic is not None
    assert found.logistic.generator == pytest.approx(2.0, rel=0.15)
    for wrong, message in (
        ([one | {"kind": None} for one in scored], "confidences without kind and logistic"),
        ([*scored, scored[0] | {"logistic": None}], "samples of 2 different confidences"),
    ):
        assert main(["--from-samples", str(written(tmp_path / "s.jsonl", wrong)), "--output", str(output)]) == 2
        assert message in capsys.readouterr().err


def test_an_interrupted_run_keeps_what_was_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def connect(server: client.RtapServer) -> client.RtapServer:
        server.config = {"confidence": {"kind": "yesno", "logistic": None}}
        return server

    async def ask(*_: Any, on_outcome: Any) -> None:
        on_outcome(Outcome(0, cycles=(CycleRecord("2", True, 0.5, 9, text="2"),)))
        raise KeyboardInterrupt

    monkeypatch.setattr(client.RtapServer, "connect", connect)
    monkeypatch.setattr(client.RtapServer, "ask", ask)
    questions = written(tmp_path / "q.jsonl", [{"question": "1+1", "answer": "2"}])
    flags = ["--server", "http://x", "--questions", str(questions), "--output", str(tmp_path / "c.json")]
    assert main(flags) == 130
    kept = tmp_path / "c.samples.jsonl"
    assert f"--from-samples {kept}" in capsys.readouterr().err
    (line,) = kept.read_text().splitlines()
    assert json.loads(line)["kind"] == "yesno"
