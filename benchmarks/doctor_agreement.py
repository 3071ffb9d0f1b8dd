"""Does vLLM do what the doctor says it would? Scheme by scheme, on this machine.

    .venv-serve/bin/python benchmarks/doctor_agreement.py          # all, 40 minutes on two cores
    .venv-serve/bin/python benchmarks/doctor_agreement.py w8a8     # some of them

What was found before, of other cases and on other machines, stays in the result file.

Makes the checkpoints of ``doctor_cases.py``, and one of them again in 4-bit containers; asks the
doctor, which loads no weights; then starts the engine on each and sends a request. They agree where
both refuse, or where the engine answers on the kernels that the doctor named.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from maca_serve import diagnose
from maca_serve.common.errors import EngineError, RequestError, UserError
from maca_serve.common.machine import describe_machine, require_vllm, versions
from maca_serve.engine.engine import Engine
from maca_serve.engine.fit import fit
from maca_serve.formats.checkpoint import open_checkpoint
from maca_serve.formats.repacking import repack
from maca_serve.verification.checks import NOT_CHECKED, PASS, check_kernel
from tables import markdown
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "doctor_agreement.json"
# Cases made from another: the same checkpoint in 4-bit containers.
REPACKED = {"w3a16-g64-in-4": "w3a16-g64"}
PROMPT = list(range(100, 140))
NO_AVX512 = ", no AVX-512"


def make_checkpoints(folder: Path, names: list[str]) -> list[Path]:
    """The cases named, or all."""
    python = ROOT / ".venv" / "bin" / "python"
    maker = ROOT / "benchmarks" / "doctor_cases.py"
    made = dict.fromkeys(REPACKED.get(name, name) for name in names)
    subprocess.run([python, maker, folder, *made], check=True)
    for name, source in REPACKED.items():
        if name in names or not names:
            repack(folder / source, folder / name, container=4)
    found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    return [path for path in found if path.name in names or not names]


def predict(folder: Path) -> dict:
    """The doctor's verdict, kernels and errors."""
    try:
        found = diagnose(folder)
    except UserError as error:
        return {"verdict": "does not load", "why": str(error), "layers": []}
    errors = [problem["what"] for problem in found["problems"] if problem["severity"] == "error"]
    return {"verdict": found["verdict"], "why": "; ".join(errors), "layers": found["layers"]}


def serve(folder: Path, layers: list[dict]) -> dict:
    """What the engine does: how it ended, and its kernels against the predicted ones."""
    checkpoint = open_checkpoint(folder)
    try:
        with Engine(checkpoint, fit(checkpoint, require_vllm())) as engine:
            engine.client().score([PROMPT], lambda _: None)
            check = check_kernel(engine.log_lines, layers)
            return {"runs": True, "kernel": engine.kernel, "named": check.status, "why": ""}
    except (EngineError, RequestError) as error:
        why = str(error).removeprefix(f"{folder}: ").partition(" (log: ")[0]
        return {"runs": False, "kernel": None, "named": NOT_CHECKED, "why": why}


def compare(folder: Path) -> dict:
    """One case."""
    doctor = predict(folder)
    engine = serve(folder, doctor["layers"])
    said = doctor["verdict"] == "loads"
    kernels = sorted({x["kernel"] for x in doctor["layers"] if x["quantized"] and x["kernel"]})
    # kernels that are a method's own code are not named in the log: then running is all there is
    agree = said == engine["runs"] and (not said or engine["named"] in (PASS, NOT_CHECKED))
    return {
        "case": folder.name,
        "doctor": {"verdict": doctor["verdict"], "kernels": kernels, "why": doctor["why"]},
        "engine": engine,
        "agree": agree,
        "machine": machine(),
    }


def machine() -> str:
    """The processor; some of one name have AVX-512 and some have not, which decides on kernels."""
    here = describe_machine()
    return here["cpu"] + ("" if "avx512f" in here["cpu_flags"] else NO_AVX512)


def short(name: str) -> str:
    """A machine in a table: `Intel`, `AMD, no AVX-512`."""
    maker = name.split()[0].removesuffix("(R)")
    return maker + (NO_AVX512 if name.endswith(NO_AVX512) else "")


def before() -> dict[tuple[str, str], dict]:
    """Cases of earlier runs, by name and machine."""
    found = json.loads(RESULT.read_text())["cases"] if RESULT.exists() else []
    return {(case["case"], case["machine"]): case for case in found}


def table(found: list[dict]) -> str:
    """A row for each case; machines that say the same share it."""
    rows: dict[tuple[str, ...], list[str]] = {}
    head = ["checkpoint", "doctor", "its kernels", "engine", "its log's kernels", "agree", "on"]
    for case in found:
        doctor, engine = case["doctor"], case["engine"]
        row = (
            case["case"],
            doctor["verdict"],
            ", ".join(doctor["kernels"]) or "—",
            "runs" if engine["runs"] else "refuses",
            engine["kernel"] or "—",
            "yes" if case["agree"] else "NO",
        )
        rows.setdefault(row, []).append(short(case["machine"]))
    return markdown([head, *([*row, "; ".join(machines)] for row, machines in rows.items())])


def main() -> None:
    """Compare, write the result after each case, print a table of all."""
    cases = before()
    with tempfile.TemporaryDirectory() as name:
        for folder in tqdm(make_checkpoints(Path(name), sys.argv[1:]), desc="engines"):
            case = compare(folder)
            cases[case["case"], case["machine"]] = case
            found = [cases[key] for key in sorted(cases)]
            content = {"versions": versions(), "cases": found}
            RESULT.write_text(json.dumps(content, indent=1) + "\n")
    print(table(found))
    print(f"{sum(case['agree'] for case in found)} of {len(found)} agree")


if __name__ == "__main__":
    main()
