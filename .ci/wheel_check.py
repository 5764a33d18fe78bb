"""What a new user does with the installed wheel. The standard library alone, beside the package."""

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import trl_personal


OF_EXTRAS = {
    "fastapi",
    "uvicorn",
    "pydantic",
    "prometheus_client",
    "openai",
}  # not installed here; nothing else may be missing
modules = [
    module.name for module in pkgutil.walk_packages(trl_personal.__path__, "trl_personal.", onerror=lambda name: None)
]
for name in modules:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in OF_EXTRAS or not name.startswith("trl_personal.serving"):
            raise
assert "site-packages" in trl_personal.__file__, trl_personal.__file__
print(f"{len(modules)} modules of {trl_personal.__file__} import.")

readme = Path(sys.argv[1]).read_text()
for number, block in enumerate(re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[:2]):
    Path(f"block_{number}.py").write_text(block)
    run = subprocess.run([sys.executable, f"block_{number}.py"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
shown = re.search(r"```text\n(.*?)```", readme, re.DOTALL).group(1).strip()
assert run.stdout.strip().splitlines()[-2:] == shown.splitlines(), run.stdout
print("The README's users get the README's answers.")
