"""Docker for the tests: the daemon that is there, or where none runs one of their own, with images to stand in."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.service.fakes import wait_until

BUILD_SECONDS = 600.0
SECONDS = 120.0
PYTHON = "python:3.11-slim"
DAEMON_PROGRAMS = ("dockerd", "debootstrap", "iptables", "tar")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
# Debian's slim images leave these out too.
LEFT_OUT = ("var/cache/apt/*", "var/lib/apt/lists/*", "usr/share/doc", "usr/share/man", "usr/share/locale")
PROMETHEUS = """\
FROM python:3.11-slim
COPY prometheus promtool /bin/
RUN mkdir /prometheus && chown 65534:65534 /prometheus
USER 65534:65534
ENTRYPOINT ["/bin/prometheus"]
"""


class MissingError(Exception):
    """What is missing for Docker to be tested here; the reason for skipping."""


@dataclass(frozen=True)
class Docker:
    """A daemon to talk to. `private`: nothing can be pulled, and a build reaches the network as this machine does."""

    environment: dict[str, str] = field(repr=False)  # may hold secrets
    private: bool

    def run(self, *command: str, seconds: float = SECONDS, cwd: Path | None = None) -> str:
        """What a command prints; raises AssertionError with all that it said when it fails."""
        done = subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=seconds, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def build(self, tag: str, context: Path, *options: str) -> None:
        """Build an image."""
        network = ("--network", "host") if self.private else ()
        self.run("docker", "build", *network, *options, "--tag", tag, str(context), seconds=BUILD_SECONDS)

    def compose(self) -> Sequence[str]:
        """The command that is here, Compose v2 or docker-compose; raises MissingError."""
        for command in (["docker", "compose"], ["docker-compose"]):
            if shutil.which(command[0]) and not self._code(*command, "version"):
                return command
        raise MissingError("neither docker compose nor docker-compose is installed")

    def _code(self, *command: str) -> int:
        return subprocess.run(
            command, env=self.environment, capture_output=True, timeout=SECONDS, check=False
        ).returncode


@contextmanager
def docker() -> Iterator[Docker]:
    """The machine's daemon, or a private one for the length of the block; raises MissingError."""
    if shutil.which("docker") is None:
        raise MissingError("docker is not installed")
    machines = Docker(dict(os.environ), private=False)
    if not machines._code("docker", "version"):
        yield machines
        return
    if os.geteuid() != 0:
        raise MissingError("no Docker daemon answers, and only root can start one")
    if missing := [name for name in DAEMON_PROGRAMS if shutil.which(name) is None]:
        raise MissingError(f"no Docker daemon answers, and to start one there is no {', '.join(missing)}")
    with _directory() as directory, _private(directory) as daemon:
        _make_python(daemon, directory / "python")
        yield daemon


@contextmanager
def _directory() -> Iterator[Path]:
    """A directory that goes in the end, with what a daemon has left mounted in it."""
    directory = Path(tempfile.mkdtemp(prefix="refrain-docker-"))
    try:
        yield directory
    finally:
        mounted = [disk.mountpoint for disk in psutil.disk_partitions(all=True)]
        for place in sorted(filter(lambda place: Path(place).is_relative_to(directory), mounted), reverse=True):
            subprocess.run(["umount", place], timeout=SECONDS, check=False)
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _private(directory: Path) -> Iterator[Docker]:
    """A daemon that leaves the machine's network as it is: no rule, no forwarding."""
    address = f"unix://{directory}/docker.sock"
    off = [f"--{name}=false" for name in ("iptables", "ip6tables", "ip-forward", "ip-masq")]
    places = ["--data-root", f"{directory}/data", "--exec-root", f"{directory}/exec", "--pidfile", f"{directory}/pid"]
    environment = {**os.environ, "DOCKER_HOST": address, "DOCKER_BUILDKIT": "0"}
    daemon = Docker(environment, private=True)
    with (directory / "dockerd.log").open("wb") as log:
        command = ["dockerd", "--host", address, *places, "--storage-driver", "overlay2", *off]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: process.poll() is not None or not daemon._code("docker", "version"), SECONDS)
        if process.poll() is not None:
            raise MissingError(f"dockerd ended: {(directory / 'dockerd.log').read_text()[-500:]}")
        yield daemon
    finally:
        process.terminate()  # ends what still runs in it
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(SECONDS)


def _make_python(daemon: Docker, root: Path) -> None:
    """Make a stand-in for the base image out of this machine's own Debian mirror."""
    packages = "--include=ca-certificates,python3,python3-pip,python3-venv"
    daemon.run(
        "debootstrap", "--variant=minbase", packages, "bookworm", str(root), _mirror(daemon), seconds=BUILD_SECONDS
    )
    shutil.copy(CERTIFICATES, root / CERTIFICATES.relative_to("/"))
    (root / "usr/bin/python").symlink_to("python3")
    for pattern in ("usr/lib/python3*/EXTERNALLY-MANAGED", *LEFT_OUT):
        for path in root.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    daemon.run("sh", "-c", f"tar --create --directory '{root}' . | docker import - {PYTHON}")
    shutil.rmtree(root)


def _mirror(daemon: Docker) -> str:
    """Where apt takes this machine's own Debian from."""
    lines = daemon.run("apt-get", "indextargets", "--format", "$(CODENAME) $(COMPONENT) $(REPO_URI)").splitlines()
    found = [fields[-1] for fields in map(str.split, lines) if fields[:2] == ["bookworm", "main"]]
    if not found:
        raise MissingError("apt knows no mirror of bookworm")
    return found[0]


def make_prometheus(daemon: Docker, tag: str, context: Path) -> None:
    """Stand in for Prometheus' image with this machine's programs; raises MissingError."""
    context.mkdir()
    for name in ("prometheus", "promtool"):
        program = shutil.which(name)
        if program is None:
            raise MissingError(f"{tag} cannot be pulled, and {name} is not installed to stand in for it")
        shutil.copy(program, context)
    (context / "Dockerfile").write_text(PROMETHEUS)
    daemon.build(tag, context)
