//! Processes that CRIU makes join the container's cgroup without waiting.
//!
//! Whoever moves a process into another cgroup takes a lock that all who fork or end share
//! (`cgroup_threadgroup_rwsem`). The first to take it in a while waits for a grace period of RCU, 6 to 16 ms
//! in which the container stands still, and the next one only if nobody has taken it since for about as long
//! (`rcu_sync_enter` in the kernel's `kernel/rcu/sync.c`). So while a container is about to be restored it is
//! taken again and again, by moving a process to where it is already.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use super::cgroup::{hierarchies, own_cgroup};

/// How often the lock is taken, which takes some 5 microseconds: no grace period is shorter than a tick of
/// the kernel's clock, 1 ms at least.
const EVERY: Duration = Duration::from_millis(1);

/// Who joins a cgroup does not wait, as long as there is this value.
#[derive(Debug)]
pub struct Joining {
    /// Its end is the thread's.
    _until: Sender<()>,
}

impl Joining {
    /// Begins with it. Where that is not possible, joining takes as long as it does.
    pub fn without_waiting() -> Joining {
        let (until, ended) = channel();
        let begun = join_own().and_then(|file| {
            std::thread::Builder::new()
                .name("livemig-joining".to_owned())
                .spawn(move || join_until(file, &ended))
        });
        if let Err(error) = begun {
            tracing::debug!(%error, "who joins a cgroup may have to wait");
        }
        Joining { _until: until }
    }
}

/// What moves whoever writes there into the cgroup in which this process is.
fn join_own() -> io::Result<File> {
    let cgroups = std::fs::read_to_string("/proc/self/cgroup")?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let path = list(&cgroups, &mounts).ok_or(io::ErrorKind::NotFound)?;
    OpenOptions::new().write(true).open(path)
}

fn list(cgroups: &str, mounts: &str) -> Option<PathBuf> {
    let mut places = hierarchies(mounts).into_iter().filter_map(|(kind, mount)| {
        let own = own_cgroup(cgroups, kind)?;
        mount.path(Path::new(own), Path::new("/"))
    });
    Some(places.next()?.join("cgroup.procs"))
}

fn join_until(mut list: File, ended: &Receiver<()>) {
    // 0 is whoever writes (cgroups(7)).
    while let Ok(()) = list.write_all(b"0") {
        if let Err(RecvTimeoutError::Disconnected) = ended.recv_timeout(EVERY) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_that_of_the_own_cgroup() {
        let mounts = "30 20 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n";
        let found = list("0::/system.slice/livemig-agent.service\n", mounts);
        let expected = "/sys/fs/cgroup/system.slice/livemig-agent.service/cgroup.procs";
        assert_eq!(found.as_deref(), Some(Path::new(expected)));
        assert_eq!(list("0::/\n", ""), None);
    }

    #[test]
    fn joining_the_own_cgroup_is_possible_and_changes_nothing() {
        let own = || std::fs::read_to_string("/proc/self/cgroup").unwrap();
        let before = own();
        let mut list = join_own().expect("a cgroup that can be joined: this test needs root");
        list.write_all(b"0").unwrap();
        assert_eq!(own(), before);
    }

    #[test]
    fn the_lock_is_taken_again_and_again_until_the_end() {
        let (until, ended) = channel();
        let file = tempfile::NamedTempFile::new().unwrap();
        let list = file.reopen().unwrap();
        let taken = || file.as_file().metadata().unwrap().len();
        let thread = std::thread::spawn(move || join_until(list, &ended));
        while taken() < 3 {
            std::thread::sleep(EVERY);
        }
        drop(until);
        thread.join().unwrap();
    }
}
