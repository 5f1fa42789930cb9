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

/// The cgroup that a process is in itself, of one and all below it.
///
/// # Errors
/// [`Error::Read`] if the cgroup cannot be read.
pub(super) fn holder(path: &Path, pid: u32) -> Result<Option<PathBuf>> {
    let mut open = vec![path.to_owned()];
    while let Some(path) = open.pop() {
        let list = match std::fs::read_to_string(path.join("cgroup.procs")) {
            Ok(list) => list,
            Err(e) if gone(&e) => continue,
            Err(source) => return Err(Error::Read { path, source }),
        };
        if list.lines().any(|line| line.parse() == Ok(pid)) {
            return Ok(Some(path));
        }
        let entries = std::fs::read_dir(&path).map_err(|source| Error::Read { path, source })?;
        let below = entries.flatten();
        open.extend(
            below
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path()),
        );
    }
    Ok(None)
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

/// Whether a thread of one of these processes waits for something that nothing interrupts (`D` in
/// proc_pid_stat(5)).
pub(super) fn any_uninterruptible(pids: &[u32]) -> bool {
    let threads = pids.iter().flat_map(|pid| {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task"));
        threads.into_iter().flatten().flatten()
    });
    let mut states = threads.filter_map(|thread| field(&thread.path(), 3));
    states.any(|state| state == "D")
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

/// What of a process CRIU cannot dump.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Obstacle {
    /// A ring of io_uring, as an open file or mapped.
    IoUring,
    /// An open file of this kind, as the kernel names it.
    File(&'static str),
    /// Another process traces it, and only one can.
    Traced {
        /// By whom: a process as this one sees it, or 0 if it cannot be seen.
        by: u32,
    },
    /// The limits of its resources may not be read (`prlimit(2)`): it belongs to another user or group
    /// than this process, which lacks `CAP_SYS_RESOURCE`.
    Limits {
        /// The user it belongs to.
        user: u32,
    },
}

/// What of these processes CRIU cannot dump. Those that have ended stand in nobody's way.
///
/// What may be read of a process is asked of this one, in place of that which will call CRIU: both are
/// root's. `proc` is `/proc`.
///
/// # Errors
/// [`Error::Read`] if what there is to know of a process may not be read.
pub fn obstacles(pids: &[u32], proc: &Path) -> Result<Vec<(u32, Obstacle)>> {
    let own = Identity::of(&proc.join("self"))?.unwrap_or_default();
    let mut found = Vec::new();
    for pid in pids {
        let process = proc.join(pid.to_string());
        let Some(identity) = Identity::of(&process)? else {
            continue;
        };
        found.extend(identity.obstacle(&own).map(|obstacle| (*pid, obstacle)));
        let files = files(&process)?;
        found.extend(files.into_iter().map(|obstacle| (*pid, obstacle)));
    }
    Ok(found)
}

/// What `/proc/PID/status` says of who a process is (proc_pid_status(5)).
#[derive(Debug, Default)]
struct Identity {
    tracer: Option<u32>,
    /// Real, effective and saved.
    users: [u32; 3],
    groups: [u32; 3],
    capabilities: u64,
}

/// `CAP_SYS_RESOURCE` of linux/capability.h.
const SYS_RESOURCE: u64 = 1 << 24;

impl Identity {
    fn of(process: &Path) -> Result<Option<Identity>> {
        let path = process.join("status");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if gone(&e) => return Ok(None),
            Err(source) => return Err(Error::Read { path, source }),
        };
        let field = |name: &str| {
            let mut lines = text.lines();
            lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        };
        let ids = |name| {
            let mut ids = [0; 3];
            let words = field(name).unwrap_or_default().split_whitespace();
            for (id, word) in ids.iter_mut().zip(words) {
                *id = word.parse().unwrap_or(u32::MAX);
            }
            ids
        };
        let tracer = field("TracerPid").map(str::trim);
        let capabilities = field("CapEff").map(str::trim).unwrap_or_default();
        Ok(Some(Identity {
            tracer: tracer
                .filter(|text| *text != "0")
                .map(|text| text.parse().unwrap_or(0)),
            users: ids("Uid"),
            groups: ids("Gid"),
            capabilities: u64::from_str_radix(capabilities, 16).unwrap_or(0),
        }))
    }

    /// The kernel's own rule for limits is `check_prlimit_permission` in kernel/sys.c.
    fn obstacle(&self, own: &Identity) -> Option<Obstacle> {
        let alike = self.users.iter().all(|id| *id == own.users[0])
            && self.groups.iter().all(|id| *id == own.groups[0]);
        match self.tracer {
            Some(by) => Some(Obstacle::Traced { by }),
            None if !alike && own.capabilities & SYS_RESOURCE == 0 => Some(Obstacle::Limits {
                user: self.users[1],
            }),
            None => None,
        }
    }
}

/// How the kernel names a ring's file.
const RING: &str = "anon_inode:[io_uring]";

/// How it names other files without a path that CRIU knows nothing of. (`lookup_fdops` in CRIU's
/// files.c and the list of anonymous inodes there say what it knows.)
const UNKNOWN: &[&str] = &[
    "anon_inode:[perf_event]",
    "anon_inode:[userfaultfd]",
    "anon_inode:bpf-prog",
    "anon_inode:bpf_link",
    "anon_inode:kvm-vm",
    "anon_inode:landlock-ruleset",
    "anon_inode:[landlock-ruleset]",
    "anon_inode:seccomp notify",
];

/// Looked for among open files and mappings, since a ring can be mapped with its file closed.
fn files(process: &Path) -> Result<Vec<Obstacle>> {
    let failed = |path: PathBuf, source: io::Error| Error::Read { path, source };
    let mut found = Vec::new();
    let mut ring = false;
    let files = process.join("fd");
    match std::fs::read_dir(&files) {
        Ok(entries) => {
            for entry in entries.flatten() {
                let Ok(file) = std::fs::read_link(entry.path()) else {
                    continue;
                };
                ring |= file.as_os_str() == RING;
                let unknown = UNKNOWN.iter().find(|name| file.as_os_str() == **name);
                found.extend(unknown.map(|name| Obstacle::File(name)));
            }
        }
        Err(e) if gone(&e) => return Ok(found),
        Err(e) => return Err(failed(files, e)),
    }
    found.dedup();
    let maps = process.join("maps");
    let mut text = Vec::new();
    // 64 MiB is some 500,000 mappings; the kernel's default bound is 65,530.
    match std::fs::File::open(&maps).and_then(|f| f.take(64 << 20).read_to_end(&mut text)) {
        Ok(_) => ring |= text.windows(RING.len()).any(|at| at == RING.as_bytes()),
        Err(e) if gone(&e) => {}
        Err(e) => return Err(failed(maps, e)),
    }
    found.extend(ring.then_some(Obstacle::IoUring));
    Ok(found)
}

/// Whether one of the processes works in this directory or has it open. It is named as they see it.
pub fn are_in(directory: &Path, pids: &[u32], proc: &Path) -> bool {
    let at = |link: PathBuf| std::fs::read_link(link).is_ok_and(|to| to == directory);
    pids.iter().any(|pid| {
        let process = proc.join(pid.to_string());
        let files = std::fs::read_dir(process.join("fd"));
        let mut open = files.into_iter().flatten().flatten();
        at(process.join("cwd")) || open.any(|entry| at(entry.path()))
    })
}

/// Protocols of which CRIU dumps no sockets, as the kernel names them (`can_dump_ipproto` in CRIU's
/// sk-inet.c, `dump_socket` in its sockets.c).
const PROTOCOLS: &[&str] = &[
    "AF_VSOCK", "ALG", "DCCP", "DCCPv6", "KCM", "MPTCP", "MPTCPv6", "PING", "PINGv6", "RDS",
    "SCTP", "SCTPv6", "SMC", "SMC6", "TIPC", "XDP",
];

/// Those of `PROTOCOLS` of which there are sockets in the network namespace of a process.
///
/// # Errors
/// [`Error::Read`] if they may not be read.
pub fn protocols(pid: u32, proc: &Path) -> Result<Vec<&'static str>> {
    let path = proc.join(pid.to_string()).join("net/protocols");
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if gone(&e) => return Ok(Vec::new()),
        Err(source) => return Err(Error::Read { path, source }),
    };
    // Name, size of a socket, how many there are, and more (`proto_seq_printf` in net/core/sock.c).
    let used = |name: &&&str| {
        text.lines().any(|line| {
            let mut words = line.split_whitespace();
            words.next() == Some(name) && words.nth(1).is_some_and(|count| count != "0")
        })
    };
    Ok(PROTOCOLS.iter().filter(used).copied().collect())
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

    const ROOT: &str = "Name:\tx\nTracerPid:\t0\nUid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\n";

    /// Processes with nothing strange about them.
    fn plain(proc: &Path, pids: &[&str]) {
        for pid in pids {
            let process = proc.join(pid);
            std::fs::create_dir_all(process.join("fd")).expect("made");
            symlink("/dev/null", process.join("fd/0")).expect("linked");
            let maps = "7f00-7f01 r--p 0 0 0 /lib/x\n";
            std::fs::write(process.join("maps"), maps).expect("written");
            std::fs::write(process.join("status"), ROOT).expect("written");
        }
    }

    #[test]
    fn rings_and_strange_files_are_found() {
        let proc = tempfile::tempdir().expect("a directory");
        let at = proc.path();
        plain(at, &["self", "1", "2", "3", "4"]);
        symlink(RING, at.join("2/fd/7")).expect("linked");
        let mapped = format!("7f-80 rw-s 0 0:f 1 {RING}\n");
        std::fs::write(at.join("3/maps"), mapped).expect("written");
        symlink("anon_inode:[userfaultfd]", at.join("4/fd/7")).expect("linked");
        symlink("anon_inode:[eventfd]", at.join("4/fd/8")).expect("linked");
        let found = obstacles(&[1, 2, 3, 4, 99], at).expect("read");
        let fault = Obstacle::File("anon_inode:[userfaultfd]");
        assert_eq!(
            found,
            [(2, Obstacle::IoUring), (3, Obstacle::IoUring), (4, fault)]
        );
        let own = obstacles(&[std::process::id()], Path::new("/proc")).expect("read");
        assert_eq!(own, []);
    }

    #[test]
    fn others_need_a_capability_and_nobody_else_who_traces() {
        let proc = tempfile::tempdir().expect("a directory");
        let at = proc.path();
        plain(at, &["self", "1", "2", "3"]);
        let status = |pid: &str, text: &str| {
            std::fs::write(at.join(pid).join("status"), text).expect("written");
        };
        status("2", &ROOT.replace("Uid:\t0\t0", "Uid:\t0\t101"));
        status("3", &ROOT.replace("TracerPid:\t0", "TracerPid:\t44"));
        let traced = (3, Obstacle::Traced { by: 44 });
        let found = obstacles(&[1, 2, 3], at).expect("read");
        assert_eq!(found, [(2, Obstacle::Limits { user: 101 }), traced.clone()]);
        status("self", &format!("{ROOT}CapEff:\t0000000001000000\n"));
        assert_eq!(obstacles(&[1, 2, 3], at).expect("read"), [traced]);
        status("self", &format!("{ROOT}CapEff:\t000001fffeffffff\n"));
        assert_eq!(obstacles(&[1, 2], at).expect("read").len(), 1);
    }

    #[test]
    fn a_directory_that_is_worked_in_is_found() {
        let proc = tempfile::tempdir().expect("a directory");
        let at = proc.path();
        plain(at, &["1", "2", "3"]);
        symlink("/data", at.join("2/cwd")).expect("linked");
        symlink("/data", at.join("3/fd/9")).expect("linked");
        let data = Path::new("/data");
        let found = [[1, 99], [1, 2], [1, 3]].map(|pids| are_in(data, &pids, at));
        assert_eq!(found, [false, true, true]);
    }

    #[test]
    fn only_protocols_that_are_used_count() {
        let proc = tempfile::tempdir().expect("a directory");
        let net = proc.path().join("7/net");
        std::fs::create_dir_all(&net).expect("made");
        let text = "protocol  size sockets  memory press\n\
            MPTCPv6   2064      0      36   no\n\
            MPTCP     1936      2      36   no\n\
            TCP       2304      1      36   no\n";
        std::fs::write(net.join("protocols"), text).expect("written");
        assert_eq!(protocols(7, proc.path()).expect("read"), ["MPTCP"]);
        assert_eq!(protocols(8, proc.path()).expect("read"), [""; 0]);
    }

    #[test]
    fn a_cgroup_that_is_gone_is_empty() {
        assert_eq!(
            in_cgroup(Path::new("/sys/fs/cgroup/none")).expect("read"),
            [] as [u32; 0]
        );
    }
}
