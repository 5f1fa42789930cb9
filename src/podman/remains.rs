//! What is left of Podman's work when its service dies in the middle of it.
//!
//! The OCI runtime is a process of its own and goes on: a checkpoint ends when it ends, a restore brings
//! a container to life that no Podman knows of. And the archives stay, which Podman keeps in its temporary
//! directory while it works on them: the memory of containers, on a disk, for good. All of this is looked
//! for in `/proc` and in the file system, since there is nobody left to ask.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime};

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};

use super::ContainerId;
use crate::criu::processes;
use crate::runtime::THAW;

/// The temporary directory of Podman's service, unless it is told otherwise.
const TEMPORARY: &str = "/var/tmp";
/// What the names of its archives begin with; the rest is a number. (`os.CreateTemp` in
/// `pkg/api/handlers/libpod/containers.go`; and `os.MkdirTemp`, for what it looks at before a restore.)
const CHECKPOINT: &str = "checkpoint";
const RESTORE: &str = "restore";
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Whether Podman is at work on a restore that it was asked for since then.
pub(crate) fn restore_under_way(since: SystemTime) -> bool {
    let services = services();
    archives(&[RESTORE]).any(|(_, about)| {
        about.modified().is_ok_and(|modified| modified >= since) && !is_orphan(&about, &services)
    })
}

/// Removes the archives of services that are dead. Those of one that lives are its own to remove.
pub(crate) fn sweep() {
    let services = services();
    for (path, about) in archives(&[CHECKPOINT, RESTORE]) {
        if is_orphan(&about, &services) {
            tracing::info!(path = %path.display(), "removing what a Podman left that died");
            let removed = match about.is_dir() {
                true => std::fs::remove_dir_all(&path),
                false => std::fs::remove_file(&path),
            };
            if let Err(error) = removed {
                tracing::warn!(path = %path.display(), %error, "it could not be removed");
            }
        }
    }
}

/// Whether a runtime is at work on a checkpoint of this container.
pub(crate) fn checkpoint_under_way(id: &ContainerId) -> bool {
    all().any(|process| process.has(b"checkpoint") && process.has(id.as_str().as_bytes()))
}

/// Whether somebody still waits to let this container go on after a round of memory.
pub(crate) fn thaw_under_way(id: &ContainerId) -> bool {
    all().any(|process| process.program() == THAW.as_bytes() && process.has(id.as_str().as_bytes()))
}

/// Whether a runtime is at work on a restore of this container.
pub(crate) fn restore_goes_on(id: &ContainerId) -> bool {
    all().any(|process| process.restores(id))
}

/// Whether anything of a container runs: itself, its monitor, or a runtime that restores it.
pub(crate) fn runs(id: &ContainerId) -> bool {
    all().any(|process| process.is_of(id))
}

/// Whether what [`runs`] would be seen from here, as Podman's service is: not if that lives in a PID
/// namespace of its own.
pub(crate) fn would_be_seen() -> bool {
    !services().is_empty()
}

/// Ends everything of a container that Podman does not know of any more, or not yet. `runtime` is the
/// program that made it. Processes may take so `long` to end that were killed, and so may the runtime to tidy up
/// after them.
pub(crate) async fn end(id: &ContainerId, runtime: &Path, long: Duration) {
    let began = Instant::now();
    loop {
        let of_it: Vec<u32> = all()
            .filter(|process| process.is_of(id))
            .map(|process| process.pid)
            .collect();
        if of_it.is_empty() || began.elapsed() >= long {
            break;
        }
        for pid in of_it {
            // CRIU, below the runtime, does not have the container's name in its arguments.
            let all = processes::descendants(pid, Path::new("/proc")).unwrap_or_else(|_| vec![pid]);
            for pid in all {
                tracing::info!(container = %id, pid, "ending what a Podman left that died");
                if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                    // It may have ended by itself.
                    let _ = kill_process(pid, Signal::KILL);
                }
            }
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    for mount in mounts(id) {
        if let Err(error) = unmount(&mount, UnmountFlags::DETACH) {
            tracing::warn!(path = %mount.display(), %error, "it could not be unmounted");
        }
    }
    // What the runtime knows of it, which would be in the way of the next attempt.
    let deleted = tokio::process::Command::new(runtime)
        .args(["delete", "--force", id.as_str()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .status();
    match tokio::time::timeout(long, deleted).await {
        Ok(Ok(status)) if status.success() => {}
        other => tracing::warn!(container = %id, ?other, "the runtime could not delete it"),
    }
    for cgroup in cgroups(id) {
        if let Err(error) = remove_tree(&cgroup) {
            tracing::warn!(path = %cgroup.display(), %error, "it could not be removed");
        }
    }
}

/// Whether anything of a container that was removed is still there: processes, or what a runtime that was
/// killed has left of it.
pub(crate) fn are_there(id: &ContainerId) -> bool {
    runs(id) || !mounts(id).is_empty() || !cgroups(id).is_empty()
}

/// What is mounted below a directory that has a container's name, the innermost first.
fn mounts(id: &ContainerId) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = mounted()
        .map(|(path, _)| path)
        .filter(|path| path.iter().any(|part| part == id.as_str()))
        .collect();
    found.reverse();
    found
}

/// The cgroups that have a container's name, in every hierarchy.
fn cgroups(id: &ContainerId) -> Vec<PathBuf> {
    /// Podman's lie three below the root, or somewhat deeper below a slice of the operator's.
    const DEEPEST: usize = 8;
    let hierarchies = mounted().filter(|(_, kind)| kind == "cgroup" || kind == "cgroup2");
    let mut waiting: Vec<(PathBuf, usize)> = hierarchies.map(|(path, _)| (path, 0)).collect();
    let mut found = Vec::new();
    while let Some((directory, depth)) = waiting.pop() {
        let entries = std::fs::read_dir(&directory)
            .into_iter()
            .flatten()
            .flatten();
        for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            if entry.file_name().to_string_lossy().contains(id.as_str()) {
                found.push(entry.path());
            } else if depth < DEEPEST {
                waiting.push((entry.path(), depth + 1));
            }
        }
    }
    found
}

/// Removes a cgroup and those below it. Their files cannot be removed, and go with them.
fn remove_tree(cgroup: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(cgroup)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    std::fs::remove_dir(cgroup)
}

/// Where something is mounted, and of which kind, in the order in which it was (proc_pid_mountinfo(5)).
fn mounted() -> impl Iterator<Item = (PathBuf, String)> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let lines: Vec<_> = text
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            // Blanks in it are written as numbers; no directory that is looked for here has any.
            let path = left.split(' ').nth(4)?;
            Some((PathBuf::from(path), right.split(' ').next()?.to_owned()))
        })
        .collect();
    lines.into_iter()
}

/// A process, as far as it matters here.
struct Process {
    pid: u32,
    arguments: Vec<Vec<u8>>,
    cgroups: String,
}

impl Process {
    /// Nothing when it has ended.
    fn read(pid: u32) -> Option<Process> {
        let read = |file: &str| std::fs::read(format!("/proc/{pid}/{file}")).ok();
        let arguments = read("cmdline")?;
        let process = Process {
            pid,
            arguments: arguments
                .split(|byte| *byte == 0)
                .map(<[u8]>::to_vec)
                .collect(),
            cgroups: String::from_utf8(read("cgroup")?).ok()?,
        };
        // One that has ended and that nobody has waited for is still listed, in its cgroup.
        (processes::state(pid)? != 'Z').then_some(process)
    }

    fn has(&self, argument: &[u8]) -> bool {
        self.arguments.iter().any(|own| own == argument)
    }

    fn program(&self) -> &[u8] {
        let path = self.arguments.first().map_or(&[][..], Vec::as_slice);
        path.rsplit(|byte| *byte == b'/').next().unwrap_or(path)
    }

    fn restores(&self, id: &ContainerId) -> bool {
        self.has(b"restore") && self.has(id.as_str().as_bytes())
    }

    fn is_of(&self, id: &ContainerId) -> bool {
        let monitors = self.program() == b"conmon" && self.has(id.as_str().as_bytes());
        self.cgroups.contains(id.as_str()) || monitors || self.restores(id)
    }
}

fn all() -> impl Iterator<Item = Process> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| Process::read(entry.file_name().to_str()?.parse().ok()?))
}

/// When the services of Podman that live were started.
fn services() -> Vec<SystemTime> {
    let services =
        all().filter(|process| process.program() == b"podman" && process.has(b"service"));
    services
        .filter_map(|service| processes::started(service.pid))
        .collect()
}

/// What root's Podman has made with such a name.
fn archives(prefixes: &'static [&'static str]) -> impl Iterator<Item = (PathBuf, Metadata)> {
    let files = std::fs::read_dir(TEMPORARY).into_iter().flatten().flatten();
    files.filter_map(move |file| {
        let name = file.file_name();
        let name = name.to_str()?;
        let number = prefixes
            .iter()
            .find_map(|prefix| name.strip_prefix(prefix))?;
        // Not followed, if it is a link: anybody can make one there.
        let about = file.metadata().ok()?;
        let is_one = !number.is_empty()
            && number.bytes().all(|byte| byte.is_ascii_digit())
            && (about.is_file() || about.is_dir())
            && about.uid() == rustix::process::geteuid().as_raw();
        is_one.then(|| (file.path(), about))
    })
}

/// Whether all services that live have begun after this file was made. Where none is to be seen (it may
/// live in a PID namespace of its own) nothing is known.
fn is_orphan(about: &Metadata, services: &[SystemTime]) -> bool {
    /// The kernel counts the start of processes in steps of 10 ms, and the time since its own start too.
    const EXACT: Duration = Duration::from_millis(50);
    let born = about.created().or_else(|_| about.modified());
    born.is_ok_and(|born| {
        !services.is_empty() && services.iter().all(|started| *started > born + EXACT)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(letter: char) -> ContainerId {
        letter.to_string().repeat(64).parse().unwrap()
    }

    fn process(arguments: &[&str], cgroups: &str) -> Process {
        Process {
            pid: 1,
            arguments: arguments
                .iter()
                .map(|text| text.as_bytes().to_vec())
                .collect(),
            cgroups: cgroups.to_owned(),
        }
    }

    #[test]
    fn what_belongs_to_a_container_is_told_from_what_only_names_it() {
        let (own, other) = (id('a'), id('b'));
        let name = own.as_str();
        let of_it = [
            process(&["/usr/bin/conmon", "-c", name, "-u", name], "0::/init"),
            process(
                &["/usr/sbin/runc", "restore", "--bundle", "/x", name],
                "0::/init",
            ),
            process(
                &["sleep", "1"],
                &format!("0::/machine.slice/libpod-{name}.scope"),
            ),
        ];
        for process in of_it {
            assert!(process.is_of(&own), "{:?}", process.arguments);
            assert!(!process.is_of(&other), "{:?}", process.arguments);
        }
        let others = [
            process(&["podman", "logs", "-f", name], "0::/user.slice"),
            process(&["vi", &format!("/tmp/{name}/restore")], "0::/user.slice"),
            process(&["runc", "checkpoint", name], "0::/init"),
        ];
        for process in others {
            assert!(!process.is_of(&own), "{:?}", process.arguments);
        }
    }

    #[test]
    fn an_archive_is_an_orphan_when_every_service_is_younger() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let about = file.as_file().metadata().unwrap();
        let born = about.created().or_else(|_| about.modified()).unwrap();
        let before = born - Duration::from_secs(1);
        let after = born + Duration::from_secs(1);
        assert!(is_orphan(&about, &[after]));
        assert!(!is_orphan(&about, &[after, before]));
        assert!(!is_orphan(&about, &[before]));
        // Nobody is to be seen: it may well be at work.
        assert!(!is_orphan(&about, &[]));
    }

    #[test]
    fn the_start_of_a_process_is_a_time_of_day() {
        let child = std::process::Command::new("sleep").arg("10").spawn();
        let mut child = child.unwrap();
        let now = SystemTime::now();
        let started = processes::started(child.id()).unwrap();
        let apart = now
            .duration_since(started)
            .unwrap_or_else(|error| error.duration());
        assert!(apart < Duration::from_secs(1), "{apart:?}");
        child.kill().unwrap();
        // Ended, and nobody has waited for it.
        while processes::state(child.id()) != Some('Z') {
            std::thread::yield_now();
        }
        assert!(Process::read(child.id()).is_none());
        child.wait().unwrap();
    }
}
