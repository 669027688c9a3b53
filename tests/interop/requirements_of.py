"""Requirements of a wheel, but for some projects: what `pip install --no-deps WHEEL` leaves to be installed.

    python requirements_of.py WHEEL [PROJECT ...]

prints one a line: those that apply to this Python without extras, less the projects named.
"""

import re
import sys
import zipfile
from email.parser import HeaderParser

from pip._vendor.packaging.requirements import Requirement


def name_of(project: str) -> str:
    """As the index spells it."""
    return re.sub(r"[-_.]+", "-", project).lower()


def requirements(wheel: str, without: set[str]) -> list[str]:
    """Of a wheel's metadata, markers applied and left out."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = HeaderParser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist") or []
    found = []
    for requirement in map(Requirement, lines):
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and name_of(requirement.name) not in without:
            requirement.marker = None
            found.append(str(requirement))
    return found


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1], {name_of(p) for p in sys.argv[2:]})))
