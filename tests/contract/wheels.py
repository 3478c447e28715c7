"""The contract against other versions of OpenRLHF, without installing them.

pip download openrlhf==0.11.1 --no-deps -d /tmp/wheels
python tests/contract/wheels.py /tmp/wheels/*.whl
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.runtime.upstream.cli import MODULE, UpstreamCli
from openrlhf_gopo.runtime.upstream.contract import breaks
from openrlhf_gopo.runtime.upstream.sources import file_in, source_file


def main(wheels: list[str]) -> int:
    broken = 0
    for wheel in wheels:
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
            top = next(path.parent for path in Path(folder).rglob("openrlhf/__init__.py"))

            def find(module: str, top: Path = top) -> Path | None:
                return file_in(top, module.split(".")[1:]) if module.startswith("openrlhf") else source_file(module)

            found = [str(one) for one in breaks(find, cpu=True)]
            try:
                UpstreamCli.load(find(MODULE)).parser.parse_args([])
            except ConfigError as error:
                found.append(str(error))
        print(f"{Path(wheel).name}: {'holds' if not found else f'{len(found)} broken'}")
        print("".join(f"  {one}\n" for one in found), end="")
        broken += bool(found)
    return int(broken > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
