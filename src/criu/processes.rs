//! The processes of a container.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::{Error, Result};

/// The kernel has at most this many processes (`PID_MAX_LIMIT` of 64-bit kernels, 2²²).
const MAX: usize = 1 << 22;
/// cgroups deeper than this below a container's are not looked for.
const MAX_DEPTH: usize = 64;

/// The processes in a cgroup and all below it, in ascending order. They are numbered as this
/// process sees them; processes that it cannot see are left out.
///
/// A cgroup that is not there has none.
///
/// # Errors
/// [`Error::Read`] if the cgroup cannot be read.
pub fn in_cgroup(path: &Path) -> Result<Vec<u32>> {
    let mut pids = BTreeSet::new();
    collect(path, 0, &mut pids)?;
    Ok(pids.into_iter().collect())
}

fn collect(path: &Path, depth: usize, pids: &mut BTreeSet<u32>) -> Result<()> {
    let failed = |path: &Path, source| Error::Read {
        path: path.to_owned(),
        source,
    };
    let list = path.join("cgroup.procs");
    match std::fs::read_to_string(&list) {
        // Processes outside of this PID namespace are listed as 0.
        Ok(text) => {
            pids.extend(
                text.lines()
                    .filter_map(|line| line.parse().ok())
                    .filter(|pid: &u32| *pid != 0),
            );
        }
        Err(e) if gone(&e) => return Ok(()),
        // A threaded cgroup: its domain's list has the processes (cgroups(7)).
        Err(e) if e.raw_os_error() == Some(rustix::io::Errno::OPNOTSUPP.raw_os_error()) => {}
        Err(e) => return Err(failed(&list, e)),
    }
    if pids.len() > MAX {
        return Err(Error::TooManyProcesses {
            path: path.to_owned(),
            limit: MAX,
        });
    }
    if depth == MAX_DEPTH {
        return Ok(());
    }
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(e) if gone(&e) => return Ok(()),
        Err(e) => return Err(failed(path, e)),
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), depth + 1, pids)?;
        }
    }
    Ok(())
}

/// Whether an error says that a process or cgroup has ended.
pub(super) fn gone(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let errno = error.raw_os_error();
    [Errno::NOENT, Errno::NODEV, Errno::SRCH]
        .iter()
        .any(|e| errno == Some(e.raw_os_error()))
}

/// A process and all that descend from it, in ascending order: for a container, whose orphans fall
/// to its first process, all of its processes but those that were put in from outside (`exec`).
///
/// `proc` is `/proc`.
///
/// # Errors
/// [`Error::Read`] if `proc` cannot be listed.
pub fn descendants(pid: u32, proc: &Path) -> Result<Vec<u32>> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    let entries = std::fs::read_dir(proc).map_err(|source| Error::Read {
        path: proc.to_owned(),
        source,
    })?;
    for entry in entries.flatten() {
        let Some(child) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        // A process that ended meanwhile has no parent any more.
        if let Some(parent) = parent(&entry.path()) {
            children.entry(parent).or_default().push(child);
        }
    }
    let mut found = BTreeSet::new();
    let mut waiting = vec![pid];
    while let Some(pid) = waiting.pop() {
        if found.insert(pid) {
            waiting.extend(children.remove(&pid).unwrap_or_default());
        }
    }
    Ok(found.into_iter().collect())
}

fn parent(process: &Path) -> Option<u32> {
    field(process, 4)?.parse().ok()
}

/// What a process does: `R`, `S`, `Z`... (proc_pid_stat(5)). Nothing when it is not there any more.
pub(crate) fn state(pid: u32) -> Option<char> {
    field(&Path::new("/proc").join(pid.to_string()), 3)?
        .chars()
        .next()
}

/// When a process was started, to within some hundredths of a second.
pub(crate) fn started(pid: u32) -> Option<SystemTime> {
    let ticks: u64 = field(&Path::new("/proc").join(pid.to_string()), 22)?
        .parse()
        .ok()?;
    let since_boot = Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second());
    let uptime = std::fs::read_to_string("/proc/uptime").ok()?;
    let uptime: f64 = uptime.split_whitespace().next()?.parse().ok()?;
    let uptime = Duration::try_from_secs_f64(uptime).ok()?;
    SystemTime::now().checked_sub(uptime.saturating_sub(since_boot))
}

/// A field of a process's `stat`, counted from 1 as proc_pid_stat(5) does, from the third on.
fn field(process: &Path, number: usize) -> Option<String> {
    let stat = std::fs::read(process.join("stat")).ok()?;
    // The second field is a name in parentheses, which may contain anything.
    let end = stat.iter().rposition(|b| *b == b')')?;
    let rest = std::str::from_utf8(&stat[end + 1..]).ok()?;
    Some(rest.split_whitespace().nth(number - 3)?.to_owned())
}

/// Those of the processes that use io_uring, which CRIU cannot dump.
///
/// Looked for among open files and mappings, since a ring can be mapped with its file closed.
/// Processes that have ended use none. `proc` is `/proc`.
///
/// # Errors
/// [`Error::Read`] if the files of a process may not be read.
pub fn with_io_uring(pids: &[u32], proc: &Path) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for pid in pids {
        let process = proc.join(pid.to_string());
        if has_ring(&process)? {
            found.push(*pid);
        }
    }
    Ok(found)
}

/// How the kernel names a ring's file.
const RING: &str = "anon_inode:[io_uring]";

fn has_ring(process: &Path) -> Result<bool> {
    let failed = |path: PathBuf, source: io::Error| Error::Read { path, source };
    let files = process.join("fd");
    match std::fs::read_dir(&files) {
        Ok(entries) => {
            for entry in entries.flatten() {
                if std::fs::read_link(entry.path()).is_ok_and(|to| to.as_os_str() == RING) {
                    return Ok(true);
                }
            }
        }
        Err(e) if gone(&e) => return Ok(false),
        Err(e) => return Err(failed(files, e)),
    }
    let maps = process.join("maps");
    let mut text = Vec::new();
    // 64 MiB is some 500,000 mappings; the kernel's default bound is 65,530.
    match std::fs::File::open(&maps).and_then(|f| f.take(64 << 20).read_to_end(&mut text)) {
        Ok(_) => Ok(text.windows(RING.len()).any(|at| at == RING.as_bytes())),
        Err(e) if gone(&e) => Ok(false),
        Err(e) => Err(failed(maps, e)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::process::Command;

    use super::*;

    #[test]
    fn descendants_are_found_through_names_with_parentheses() {
        let proc = tempfile::tempdir().expect("a directory");
        for (pid, parent, name) in [
            (1, 0, "init"),
            (10, 1, "a) S 99 ("),
            (11, 10, "b"),
            (12, 1, "c"),
        ] {
            let directory = proc.path().join(pid.to_string());
            std::fs::create_dir(&directory).expect("made");
            std::fs::write(
                directory.join("stat"),
                format!("{pid} ({name}) S {parent} 0 0"),
            )
            .expect("written");
        }
        assert_eq!(descendants(10, proc.path()).expect("listed"), [10, 11]);
    }

    #[test]
    fn a_real_child_is_a_descendant() {
        let mut child = Command::new("sleep").arg("60").spawn().expect("started");
        let found = descendants(std::process::id(), Path::new("/proc")).expect("listed");
        child.kill().expect("killed");
        child.wait().expect("waited");
        assert!(found.contains(&child.id()) && found.contains(&std::process::id()));
    }

    #[test]
    fn rings_are_found_in_files_and_mappings() {
        let proc = tempfile::tempdir().expect("a directory");
        for pid in 1..=4 {
            let files = proc.path().join(pid.to_string()).join("fd");
            std::fs::create_dir_all(&files).expect("made");
            symlink("/dev/null", files.join("0")).expect("linked");
            std::fs::write(
                files.with_file_name("maps"),
                "7f00-7f01 r--p 0 0 0 /lib/x\n",
            )
            .expect("written");
        }
        symlink(RING, proc.path().join("2/fd/7")).expect("linked");
        std::fs::write(
            proc.path().join("3/maps"),
            format!("7f-80 rw-s 0 0:f 1 {RING}\n"),
        )
        .expect("written");
        let found = with_io_uring(&[1, 2, 3, 4, 99], proc.path()).expect("read");
        assert_eq!(found, [2, 3]);
        let own = with_io_uring(&[std::process::id()], Path::new("/proc")).expect("read");
        assert_eq!(own, [] as [u32; 0]);
    }

    #[test]
    fn a_cgroup_that_is_gone_is_empty() {
        assert_eq!(
            in_cgroup(Path::new("/sys/fs/cgroup/none")).expect("read"),
            [] as [u32; 0]
        );
    }
}
