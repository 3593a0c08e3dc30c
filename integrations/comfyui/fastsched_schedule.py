"""Read schedules saved by fastsched, inside ComfyUI: the files of the package's nodes, and the older node.

The older node "Load Schedule" gives SIGMAS and the solver's name. It is deprecated: the package's node of that name
also gives the SAMPLER. Put alone into ComfyUI's ``custom_nodes`` folder, this file still works; it needs only what
ComfyUI itself needs. Schedules of the fitted solver then need a sampler of their own: ``fastsched_fitted.py``.

A workflow may come from someone else, so its file name is not trusted. Only regular files of at most 1 MB inside the
input folder, or inside the folder to which the package's nodes save, are read. Invalid content gives an error message.
"""

import hashlib
import json
import math
import os
import stat

import torch

FORMAT = "fastsched.schedule"
VERSION = 4
LARGEST_FILE = 1 << 20
NOISES = ("ve", "vp", "flow")

#: The package's nodes save into this folder of ComfyUI's output folder. Names of its files end in `OUTPUT`.
SAVED = "fastsched"
OUTPUT = " [output]"

#: ComfyUI sets the last ``alphas_cumprod`` of a zero-terminal-SNR model to this value, and so its largest sigma to
#: 4518.76. A schedule's infinite first sigma becomes this one.
LAST_ALPHA_BAR = 4.8973451890853435e-08
LARGEST_SIGMA = math.sqrt((1 - LAST_ALPHA_BAR) / LAST_ALPHA_BAR)


class FastschedScheduleLoader:
    """Load SIGMAS from ``Schedule.save``'s JSON: 1-D float32, descending, ``steps + 1`` values, the last 0."""

    CATEGORY = "sampling/schedulers"
    DEPRECATED = True
    DESCRIPTION = "Load a noise schedule saved by fastsched. The node of the same name in sampling/fastsched does more."
    FUNCTION = "load"
    RETURN_TYPES = ("SIGMAS", "STRING")
    RETURN_NAMES = ("sigmas", "solver")

    @classmethod
    def INPUT_TYPES(cls):
        """The node's only input: the file's name within the input folder."""
        return {"required": {"file": ("STRING", {"default": "schedule.json", "multiline": False})}}

    @classmethod
    def VALIDATE_INPUTS(cls, file):
        """True, or a message that ComfyUI shows before it runs anything."""
        return readable(read_schedule, file)

    @classmethod
    def IS_CHANGED(cls, file):
        """A digest of the file, so that ComfyUI runs the node again after a change; NaN (never equal) if unknown."""
        if file is None:
            return float("nan")
        try:
            return hashlib.sha256(read_bytes(file)).hexdigest()
        except (OSError, ValueError):
            return float("nan")

    def load(self, file):
        """The sigmas and the solver's name."""
        sigmas, solver = read_schedule(file)
        return (sigmas, solver)


def readable(read, file):
    """True if ``read(file)`` works, or else what is wrong; ``file`` is None if another node provides it, at a run."""
    if file is None:
        return True
    try:
        read(file)
    except (OSError, ValueError) as error:
        return str(error)
    return True


def input_folder():
    """ComfyUI's input folder; outside ComfyUI, the current one."""
    try:
        import folder_paths
    except ImportError:
        return os.getcwd()
    return folder_paths.get_input_directory()


def saved_folder():
    """Where the package's nodes save; None outside ComfyUI."""
    try:
        import folder_paths

        return os.path.join(folder_paths.get_output_directory(), SAVED)
    except (ImportError, AttributeError):
        return None


def find(file):
    """The path of ``file`` inside the input folder, or inside that of saved schedules if its name ends in `OUTPUT`.

    Raises:
        ValueError: If it is not the name of a file inside the folder, links followed.
    """
    if not isinstance(file, str) or not file.strip() or "\0" in file:
        raise ValueError(f"file must be the name of a file in ComfyUI's input folder, got {file!r}")
    folder, saved = os.path.realpath(input_folder()), saved_folder()
    if file.endswith(OUTPUT) and saved is not None:
        folder, file = os.path.realpath(saved), file[: -len(OUTPUT)]
    path = os.path.normpath(os.path.join(folder, file))
    # Outside paths are refused by their names alone, so that the answer does not tell whether they exist.
    resolved = os.path.realpath(path) if _inside(path, folder) else path
    if not _inside(resolved, folder):
        raise ValueError(f"file must be inside ComfyUI's input folder, got {file!r}; move the schedule there")
    return resolved


def _inside(path, folder):
    try:
        return path != folder and os.path.commonpath([path, folder]) == folder
    except ValueError:  # another drive
        return False


def read_bytes(file):
    """The content of a regular file of at most `LARGEST_FILE` bytes inside the input folder.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is outside the folder, not a regular file, or too large.
    """
    path = find(file)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"No such file: {file!r} was looked for at {path}; move the schedule there") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"file must be a regular file, got {file!r}")
    # The path may have become a pipe or a link since then, so it is opened without blocking and checked again.
    flags = os.O_RDONLY
    for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_BINARY"):  # each system lacks some of these
        flags |= getattr(os, name, 0)
    with open(os.open(path, flags), "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise ValueError(f"file must be a regular file, got {file!r}")
        content = stream.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ValueError(f"{file} is larger than {LARGEST_FILE} bytes, so it is not a schedule")
    return content


def read_schedule(file):
    """The sigmas, float32 [steps + 1], and the solver of a saved schedule.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not a schedule, comes from a newer version, has sigmas that float32 cannot hold, or is for
            the fitted solver.
    """
    entries = read_entries(file)
    check_coupled(file, entries)
    if entries.get("weights") is not None:
        raise ValueError(
            f"{file} has the weights of a fitted solver, which ComfyUI's samplers cannot use; load it with the node "
            "Load Fitted Schedule (fastsched_fitted.py)"
        )
    return read_sigmas(file, entries), entries.get("solver", "")


def read_entries(file):
    """The JSON entries of a saved schedule, of which format, version and solver are checked.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not a schedule, or comes from a newer version.
    """
    data = read_bytes(file)
    try:
        entries = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}); save the schedule again") from None
    except ValueError as error:  # of its grammar, an entry that occurs twice, or an integer of thousands of digits
        raise ValueError(f"{file} is not a complete JSON file ({error}); save the schedule again") from None
    except RecursionError:
        raise ValueError(f"{file} is nested too deeply to be a schedule") from None
    if not isinstance(entries, dict) or entries.get("format") != FORMAT:
        raise ValueError(f"{file} does not hold a schedule; fastsched's Schedule.save writes them")
    version = entries.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= VERSION:
        raise ValueError(f"{file} has version {_brief(version)}; versions 1 to {VERSION} are supported")
    if "sha256" in entries and entries["sha256"] != _checksum(entries):
        raise ValueError(
            f"{file} was changed or damaged after it was saved; save the schedule again, or remove its entry sha256 if "
            "the change was meant"
        )
    solver = entries.get("solver", "")
    if not isinstance(solver, str):
        raise ValueError(f"{file}: solver must be text, got {_brief(solver)}")
    return entries


def check_coupled(file, entries):
    """ValueError if levels are decoupled, which only the sampler of the package's node Load Schedule can use."""
    if "network_sigmas" in entries or "decoupled" in entries:
        raise ValueError(
            f"{file} has decoupled levels (network_sigmas); load it with fastsched's whole package, node Load Schedule"
        )


def read_sigmas(file, entries):
    """The sigmas among ``entries``, float32 [steps + 1].

    Raises:
        ValueError: If they do not descend to 0 as float32, or are flow times above 1.
    """
    values, noise = entries.get("sigmas"), entries.get("noise", "ve")
    if not isinstance(values, list) or not all(map(_is_number, values)):
        raise ValueError(f"{file}: sigmas must be a list of numbers, got {_brief(values)}")
    if noise not in NOISES:
        raise ValueError(f"{file}: noise must be one of {', '.join(map(repr, NOISES))}, got {_brief(noise)}")
    try:
        sigmas = torch.tensor([float(value) for value in values], dtype=torch.float64)
    except OverflowError:
        raise ValueError(f"{file}: sigmas must be finite, got an integer that float64 cannot hold") from None
    if noise == "vp" and values and values[0] == "inf":  # not a number such as 1e400, which is read as infinity
        sigmas[0] = LARGEST_SIGMA
    single = sigmas.to(torch.float32)
    descending = bool((single[1:] < single[:-1]).all())
    if len(single) < 2 or not descending or single[-1] != 0 or not bool(single.isfinite().all()):
        raise ValueError(
            f"{file}: sigmas must be finite, strictly descend and end in 0 as float32, got {_brief(values)}"
        )
    if noise == "flow" and single[0] > 1:
        raise ValueError(f"{file}: sigmas of a flow model must be at most 1, got {_brief(values)}")
    return single


def _checksum(entries):
    """The checksum of entries, as `fastsched.sampling.schedule_files` computes it."""
    text = json.dumps({key: value for key, value in entries.items() if key != "sha256"}, sort_keys=True).encode()
    return hashlib.sha256(len(text).to_bytes(8, "little") + text).hexdigest()


def _is_number(value):
    """Whether ``value`` is a JSON number, or "inf", as fastsched writes an infinite first sigma."""
    return value == "inf" or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _without_duplicates(pairs):
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("an entry occurs twice")
    return entries


def _brief(value):
    try:
        text = repr(value)
    except ValueError:  # an integer of too many digits
        return "a huge integer"
    return text if len(text) <= 200 else text[:200] + "..."


NODE_CLASS_MAPPINGS = {"FastschedScheduleLoader": FastschedScheduleLoader}
NODE_DISPLAY_NAME_MAPPINGS = {"FastschedScheduleLoader": "Load Schedule (fastsched)"}
