"""What this package writes to disk: whole or absent, beside its place, and never over what is not its own.

    folders       how an output is recognised before it is replaced; staging, locking, and the move into place
    file_table    SHA-256 of every file of a folder, what a manifest looks like, reading what strangers made
    names         of files, as people and shells can read them
    signing       signatures of folders, and what a signed folder holds

A run has ``OUTPUT.partial`` to itself: a folder with a marker that is locked while the run lives. It holds
the output until that is whole, what was replaced until the new one has its place, and the stages that a
run can go on from. What a killed run left in it is used or removed by the next one; a folder of that name
without the marker is refused.
"""

from cbpt_runtime.artifacts.file_table import (
    NOT_LISTED,
    NUMBER,
    ListedFile,
    check_files,
    finite_number,
    hash_files,
    list_files,
    read_json_file,
    read_regular_file,
    records_of,
    shape_problems,
)
from cbpt_runtime.artifacts.folders import (
    MARKER,
    MAX_MANIFEST_BYTES,
    Kind,
    check_output,
    claimed,
    listed_in,
    marked,
    new_file,
    new_folder,
    reserved,
    writing,
)

__all__ = [
    "MARKER",
    "MAX_MANIFEST_BYTES",
    "NOT_LISTED",
    "NUMBER",
    "Kind",
    "ListedFile",
    "check_files",
    "check_output",
    "claimed",
    "finite_number",
    "hash_files",
    "list_files",
    "listed_in",
    "marked",
    "new_file",
    "new_folder",
    "read_json_file",
    "read_regular_file",
    "records_of",
    "reserved",
    "shape_problems",
    "writing",
]
