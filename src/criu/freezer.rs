//! Stopping all processes of a container at once, and letting them go.
//!
//! CRIU can do this itself, but looks whether they have stopped in steps of 100 ms. Done
//! beforehand it takes well under a millisecond, CRIU finds the cgroup frozen, and (with
//! `--leave-running`) leaves it so: nothing of the source is lost until the destination has said
//! that the container runs there.
//!
//! It must be the very cgroup that the runtime tells CRIU to freeze. CRIU thaws that one while it
//! traces the processes, which does nothing as long as a cgroup above it is frozen too, and it
//! would then wait for ever (`freeze_processes` in CRIU's `criu/seize.c`). The runtimes name the
//! cgroup that they manage: `libpod-<id>` or `libpod-<id>.scope`, and under systemd crun's own
//! child of that, `container` (`find_systemd_subgroup` in crun's `src/libcrun/cgroup-systemd.c`).
//! conmon lives beside it, in `libpod-conmon-<id>`, and must go on running.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::cgroup::{Kind, hierarchies, own_cgroup};
use super::processes::{self, gone};
use super::{Error, Result};

/// The cgroup that stops a container's processes.
///
/// It can be written down and read back later, which is how a crashed migration finds what it has
/// to thaw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Freezer {
    path: PathBuf,
    kind: Kind,
}

/// For how long processes go on that were frozen at a moment when they cannot be traced: as long as it takes to
/// become another program, as a rule.
const FOR_THE_CHILD: Duration = Duration::from_micros(500);

/// How often processes that are elsewhere are looked for.
const ROUNDS: usize = 8;

/// Whether a container's processes are stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// They run.
    Thawed,
    /// They have been told to stop and have not all done so.
    Freezing,
    /// They have stopped.
    Frozen,
    /// The cgroup is not there any more, so the container is not either.
    Gone,
}

impl Freezer {
    /// Finds the cgroup of a container by its first process.
    ///
    /// `root` is `/`, or another host's root directory as this process sees it, with its `proc` and
    /// `sys` in it. The process is numbered as that `proc` numbers it.
    ///
    /// # Errors
    /// [`Error::NoFreezer`] if the process has no cgroup that can be frozen, or if it is Podman's
    /// monitor; [`Error::Read`] if `proc` cannot be read.
    pub fn of(pid: u32, root: &Path) -> Result<Freezer> {
        let read = |path: PathBuf| {
            std::fs::read_to_string(&path).map_err(|source| Error::Read { path, source })
        };
        let cgroups = read(root.join(format!("proc/{pid}/cgroup")))?;
        let mounts = read(root.join("proc/self/mountinfo"))?;
        let none = |why: String| Error::NoFreezer { pid, why };
        let mut why = String::from("no cgroup file system with a freezer is mounted");
        for (kind, mount) in hierarchies(&mounts) {
            let Some(own) = own_cgroup(&cgroups, kind) else {
                continue;
            };
            let managed = managed(own);
            if managed
                .file_name()
                .is_some_and(|n| n.as_encoded_bytes().starts_with(CONMON))
            {
                return Err(none("it is Podman's monitor and not the container".into()));
            }
            let Some(path) = mount.path(&managed, root) else {
                why = format!("its cgroup {own} is outside of what is mounted here");
                continue;
            };
            if managed == Path::new("/") {
                why = "it is in the root cgroup, which cannot be frozen".into();
                continue;
            }
            let freezer = Freezer { path, kind };
            if !freezer.control().exists() {
                why = format!("{} is not there", freezer.control().display());
                continue;
            }
            if let Some(other) = freezer.stranger(pid, root)? {
                return Err(none(format!(
                    "its cgroup {own} is not its own: process {other} is in it as well"
                )));
            }
            return Ok(freezer);
        }
        Err(none(why))
    }

    /// A process in the cgroup that does not descend from the container's first.
    ///
    /// A cgroup that Podman has named after a container is that container's, processes that were
    /// put in from outside included. But a container can also be without a cgroup of its own
    /// (`--cgroups=disabled`), and then sits in Podman's: freezing that would stop Podman.
    fn stranger(&self, pid: u32, root: &Path) -> Result<Option<u32>> {
        let names = self
            .path
            .components()
            .filter_map(|part| part.as_os_str().to_str());
        if names.filter_map(container_cgroup).next().is_some() {
            return Ok(None);
        }
        let proc = root.join("proc");
        // In this order: whoever has ended in between is neither a descendant nor there any more.
        let inside = processes::in_cgroup(&self.path)?;
        let own = processes::descendants(pid, &proc)?;
        let strange =
            |pid: &u32| own.binary_search(pid).is_err() && proc.join(pid.to_string()).exists();
        Ok(inside.into_iter().find(strange))
    }

    /// Brings those of the container's processes that are in another cgroup to where its first one is,
    /// and returns how many there were.
    ///
    /// A runtime that restores a container without CRIU's help in cgroups (crun with
    /// `manage-cgroups=ignore`) puts its first process into the cgroup, and leaves the others where it
    /// is itself: they would not be frozen, limited or counted with it.
    ///
    /// # Errors
    /// [`Error::Read`] if it cannot be found out who is where, [`Error::Gather`] if one cannot be moved.
    pub fn gather(&self, pid: u32, root: &Path) -> Result<usize> {
        let proc = root.join("proc");
        let mut moved = 0;
        // A process may have a child between being seen and being moved.
        for _ in 0..ROUNDS {
            let own = processes::descendants(pid, &proc)?;
            let inside = processes::in_cgroup(&self.path)?;
            let outside: Vec<u32> = own
                .into_iter()
                .filter(|pid| inside.binary_search(pid).is_err())
                .filter(|pid| proc.join(pid.to_string()).exists())
                .collect();
            if outside.is_empty() {
                break;
            }
            let Some(home) = processes::holder(&self.path, pid)? else {
                break;
            };
            let list = home.join("cgroup.procs");
            for pid in outside {
                match std::fs::write(&list, pid.to_string()) {
                    Ok(()) => moved += 1,
                    Err(error) if gone(&error) => {}
                    Err(source) => {
                        return Err(Error::Gather {
                            pid,
                            cgroup: home,
                            source,
                        });
                    }
                }
            }
        }
        Ok(moved)
    }

    /// The cgroup's directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn control(&self) -> PathBuf {
        self.path.join(match self.kind {
            Kind::Unified => "cgroup.freeze",
            Kind::Legacy => "freezer.state",
        })
    }

    /// Whether the processes are stopped.
    ///
    /// # Errors
    /// [`Error::Read`] if the cgroup cannot be read.
    pub fn state(&self) -> Result<State> {
        match self.try_state() {
            Ok(state) => Ok(state),
            Err(error) if gone(&error) => Ok(State::Gone),
            Err(source) => Err(Error::Read {
                path: self.path.clone(),
                source,
            }),
        }
    }

    fn try_state(&self) -> io::Result<State> {
        let control = std::fs::read_to_string(self.control())?;
        Ok(match (self.kind, control.trim_end()) {
            (Kind::Legacy, "FROZEN") => State::Frozen,
            (Kind::Legacy, "FREEZING") => State::Freezing,
            (Kind::Legacy, _) => State::Thawed,
            (Kind::Unified, wanted) => {
                let events = std::fs::read_to_string(self.events())?;
                let frozen = events.lines().any(|line| line == "frozen 1");
                match (wanted, frozen) {
                    // Also where a cgroup above this one is frozen.
                    (_, true) => State::Frozen,
                    ("0", false) => State::Thawed,
                    (_, false) => State::Freezing,
                }
            }
        })
    }

    fn events(&self) -> PathBuf {
        self.path.join("cgroup.events")
    }

    /// Stops all processes and returns how long that took.
    ///
    /// If they have not stopped within `bound` they are let go again. If the future is dropped,
    /// they stay as they are: [`Freezer::thaw`] undoes that.
    ///
    /// # Errors
    /// [`Error::NotFrozen`] after `bound`; [`Error::Write`] and [`Error::Read`] if the cgroup does
    /// not answer, for instance because the container has ended.
    pub async fn freeze(&self, bound: Duration) -> Result<Duration> {
        let begin = Instant::now();
        let failed = |source| Error::Read {
            path: self.path.clone(),
            source,
        };
        let changes = match self.kind {
            Kind::Unified => Some(self.watch().map_err(failed)?),
            Kind::Legacy => None,
        };
        self.write(self.frozen())?;
        let mut pause = Duration::from_micros(200);
        let mut looks = 0_u32;
        loop {
            if self.try_state().map_err(failed)? == State::Frozen {
                if !self.waits_for_a_child()? {
                    return Ok(begin.elapsed());
                }
                self.thaw()?;
                tokio::time::sleep(FOR_THE_CHILD).await;
                self.write(self.frozen())?;
            }
            let Some(left) = bound.checked_sub(begin.elapsed()) else {
                self.thaw()?;
                return Err(Error::NotFrozen {
                    path: self.path.clone(),
                    waited: begin.elapsed(),
                });
            };
            match &changes {
                Some(changes) => {
                    // The kernel tells of every change; looking again now and then costs nothing.
                    let soon = left.min(Duration::from_millis(20));
                    let told = changes.ready(Interest::PRIORITY);
                    if let Ok(ready) = tokio::time::timeout(soon, told).await {
                        ready.map_err(failed)?.clear_ready();
                    }
                }
                None => {
                    // The v1 freezer tells nothing, and can miss a process unless it is asked again
                    // (`cgroupv1_freezer_kludges` in CRIU's criu/seize.c).
                    tokio::time::sleep(pause.min(left)).await;
                    pause = (pause * 2).min(Duration::from_millis(10));
                    looks += 1;
                    if looks.is_multiple_of(8) {
                        self.write("FROZEN")?;
                    }
                }
            }
        }
    }

    /// Whether somebody waits for a child of his to become another program (vfork(2)). The kernel calls him frozen,
    /// but he cannot be stopped for tracing until the child has done so, which is frozen as well: CRIU would wait
    /// in vain, 10 s. (`wait_for_vfork_done` in the kernel's `kernel/fork.c`; all others wait where a tracer can
    /// interrupt them.) The v1 freezer CRIU opens while it stops the processes.
    fn waits_for_a_child(&self) -> Result<bool> {
        if self.kind == Kind::Legacy {
            return Ok(false);
        }
        let inside = processes::in_cgroup(&self.path)?;
        Ok(inside.len() > 1 && processes::any_uninterruptible(&inside))
    }

    fn frozen(&self) -> &'static str {
        match self.kind {
            Kind::Unified => "1",
            Kind::Legacy => "FROZEN",
        }
    }

    /// Tells of changes in `cgroup.events`, as a file that can be polled (cgroups(7)). Watching it with
    /// inotify would tell as well, but closing that takes the kernel 4 to 16 ms, in which the container
    /// stands still.
    fn watch(&self) -> io::Result<AsyncFd<File>> {
        let events = File::open(self.events())?;
        // SAFETY: the value owns its file, and nothing here closes or replaces it.
        Ok(unsafe { AsyncFd::register_with_interest(events, Interest::PRIORITY) }?)
    }

    /// Lets all processes go on. Doing it twice does no harm, nor does a container that is gone.
    ///
    /// # Errors
    /// [`Error::Write`] if the cgroup is there but cannot be thawed.
    pub fn thaw(&self) -> Result<()> {
        let thawed = match self.kind {
            Kind::Unified => "0",
            Kind::Legacy => "THAWED",
        };
        match self.write(thawed) {
            Err(Error::Write { source, .. }) if gone(&source) => Ok(()),
            other => other,
        }
    }

    fn write(&self, value: &'static str) -> Result<()> {
        let path = self.control();
        // Never made: a cgroup that has gone stays gone.
        std::fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()))
            .map_err(|source| Error::Write {
                value,
                path,
                source,
            })
    }
}

const CONMON: &[u8] = b"libpod-conmon-";

/// The cgroup that the runtime manages, from that of one of the container's processes, which may
/// have made cgroups of its own below it.
fn managed(own: &str) -> PathBuf {
    let mut managed = PathBuf::from("/");
    let mut parts = own.split('/').filter(|part| !part.is_empty()).peekable();
    while let Some(part) = parts.next() {
        managed.push(part);
        if part.as_bytes().starts_with(CONMON) {
            return managed;
        }
        if let Some(scope) = container_cgroup(part) {
            if scope && parts.peek() == Some(&"container") {
                managed.push("container");
            }
            return managed;
        }
    }
    managed
}

/// Whether Podman has named a cgroup after a container (`getOCICgroupPath` in its
/// `libpod/container_internal_linux.go`), and if so, whether it is a systemd scope.
fn container_cgroup(name: &str) -> Option<bool> {
    let id = name
        .strip_prefix("libpod-payload-")
        .or(name.strip_prefix("libpod-"))?;
    let (id, scope) = id
        .strip_suffix(".scope")
        .map_or((id, false), |id| (id, true));
    (id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit())).then_some(scope)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::{Child, Command, Stdio};

    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn the_runtimes_cgroup_is_found_above_the_containers_own() {
        for (own, expected) in [
            ("/libpod_parent/libpod-ID", "/libpod_parent/libpod-ID"),
            (
                "/libpod_parent/libpod-ID/init.scope",
                "/libpod_parent/libpod-ID",
            ),
            (
                "/machine.slice/libpod-ID.scope",
                "/machine.slice/libpod-ID.scope",
            ),
            // crun below systemd, and a systemd in the container below that.
            (
                "/machine.slice/libpod-ID.scope/container/system.slice",
                "/machine.slice/libpod-ID.scope/container",
            ),
            // runc has no such child: this one is the container's own.
            (
                "/libpod_parent/libpod-ID/container",
                "/libpod_parent/libpod-ID",
            ),
            (
                "/libpod_parent/libpod_pod_ID/libpod-ID",
                "/libpod_parent/libpod_pod_ID/libpod-ID",
            ),
            (
                "/x.service/libpod-payload-ID/y",
                "/x.service/libpod-payload-ID",
            ),
            ("/libpod-conmon-ID/x", "/libpod-conmon-ID"),
            ("/libpod-short/x", "/libpod-short/x"),
            ("/", "/"),
        ] {
            assert_eq!(
                managed(&own.replace("ID", ID)),
                Path::new(&expected.replace("ID", ID))
            );
        }
    }

    /// A host's `proc` and `sys`, as files.
    fn host(cgroup: &str, mountinfo: &str, controls: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a directory");
        let proc = root.path().join("proc");
        for directory in ["self", "7"] {
            std::fs::create_dir_all(proc.join(directory)).expect("made");
        }
        std::fs::write(proc.join("7/cgroup"), cgroup).expect("written");
        std::fs::write(proc.join("self/mountinfo"), mountinfo).expect("written");
        for control in controls {
            let path = root.path().join(control);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("made");
            std::fs::write(path, "").expect("written");
        }
        root
    }

    const V2: &str =
        "30 20 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
    const HYBRID: &str = "\
        31 20 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
        32 20 0:28 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n\
        33 20 0:29 / /sys/fs/cgroup/cpu\\040acct rw - cgroup cgroup rw,cpu,cpuacct\n";

    #[test]
    fn the_hierarchy_is_the_one_that_runtimes_use() {
        let name = format!("libpod-{ID}");
        let host_v2 = host(
            &format!("5:freezer:/elsewhere\n0::/{name}/sub\n"),
            &format!("{HYBRID}{V2}"),
            &[&format!("sys/fs/cgroup/{name}/cgroup.freeze")],
        );
        let freezer = Freezer::of(7, host_v2.path()).expect("found");
        assert_eq!(
            freezer.path(),
            host_v2.path().join("sys/fs/cgroup").join(&name)
        );
        assert_eq!(freezer.kind, Kind::Unified);

        let both = format!("5:cpu,freezer:/{name}\n0::/{name}\n");
        let hybrid = host(
            &both,
            HYBRID,
            &[
                &format!("sys/fs/cgroup/freezer/{name}/freezer.state"),
                &format!("sys/fs/cgroup/unified/{name}/cgroup.freeze"),
            ],
        );
        assert_eq!(
            Freezer::of(7, hybrid.path()).expect("found").kind,
            Kind::Legacy
        );

        let only_v2 = host(
            &format!("5:freezer:/\n0::/{name}\n"),
            HYBRID,
            &[&format!("sys/fs/cgroup/unified/{name}/cgroup.freeze")],
        );
        assert_eq!(
            Freezer::of(7, only_v2.path()).expect("found").kind,
            Kind::Unified
        );
    }

    #[test]
    fn what_must_not_be_frozen_is_not() {
        for cgroup in [
            format!("0::/libpod-conmon-{ID}\n"),
            "0::/\n".to_owned(),
            format!("0::/../libpod-{ID}\n"),
            String::new(),
        ] {
            let host = host(&cgroup, V2, &["sys/fs/cgroup/cgroup.freeze"]);
            let result = Freezer::of(7, host.path());
            assert!(
                matches!(result, Err(Error::NoFreezer { pid: 7, .. })),
                "{cgroup}: {result:?}"
            );
        }
    }

    #[test]
    fn a_cgroup_that_is_shared_with_others_is_refused() {
        let mount = mounted(Kind::Unified).expect("a cgroup v2 mount: this test needs one");
        let counting = Counting::start(&mount, "shared");
        // What it starts is its own.
        Freezer::of(counting.child.id(), Path::new("/")).expect("found");
        let mut other = Command::new("sleep").arg("60").spawn().expect("started");
        let joined = std::fs::write(counting.path.join("cgroup.procs"), other.id().to_string());
        let result = Freezer::of(counting.child.id(), Path::new("/"));
        other.kill().expect("killed");
        other.wait().expect("waited");
        joined.expect("joined");
        assert!(matches!(result, Err(Error::NoFreezer { .. })), "{result:?}");
    }

    #[test]
    fn a_freezer_can_be_written_down() {
        let freezer = Freezer {
            path: "/sys/fs/cgroup/x".into(),
            kind: Kind::Unified,
        };
        let text = serde_json::to_string(&freezer).expect("written");
        assert_eq!(text, r#"{"path":"/sys/fs/cgroup/x","kind":"unified"}"#);
        assert_eq!(
            serde_json::from_str::<Freezer>(&text).expect("read"),
            freezer
        );
    }

    #[tokio::test]
    async fn a_container_that_is_gone_can_be_thawed() {
        for kind in [Kind::Unified, Kind::Legacy] {
            let freezer = Freezer {
                path: "/sys/fs/cgroup/no-such-cgroup".into(),
                kind,
            };
            freezer.thaw().expect("nothing to do");
            assert_eq!(freezer.state().expect("known"), State::Gone);
            freezer
                .freeze(Duration::from_secs(1))
                .await
                .expect_err("nothing to freeze");
        }
    }

    /// A cgroup with a process in it that counts aloud; both go with the value.
    struct Counting {
        path: PathBuf,
        child: Child,
        lines: std::sync::mpsc::Receiver<String>,
    }

    impl Counting {
        fn start(mount: &Path, name: &str) -> Counting {
            let path = mount.join(format!("livemig-test-{name}-{}", std::process::id()));
            std::fs::create_dir(&path).expect("made: this test needs root");
            let mut child = Command::new("sh")
                .args([
                    "-c",
                    "echo $$ > $0/cgroup.procs && while :; do echo x; sleep 0.002; done",
                ])
                .arg(&path)
                .stdout(Stdio::piped())
                .spawn()
                .expect("started");
            let output = BufReader::new(child.stdout.take().expect("piped"));
            let (send, lines) = std::sync::mpsc::channel();
            std::thread::spawn(move || {
                for line in output.lines().map_while(Result::ok) {
                    if send.send(line).is_err() {
                        break;
                    }
                }
            });
            lines
                .recv_timeout(Duration::from_secs(10))
                .expect("it counts");
            Counting { path, child, lines }
        }

        fn counts(&self, patience: Duration) -> bool {
            self.lines.recv_timeout(patience).is_ok()
        }
    }

    impl Drop for Counting {
        fn drop(&mut self) {
            for kind in [Kind::Unified, Kind::Legacy] {
                let freezer = Freezer {
                    path: self.path.clone(),
                    kind,
                };
                if freezer.control().exists() {
                    let _ = freezer.thaw();
                }
            }
            let _ = self.child.kill();
            let _ = self.child.wait();
            // The `sleep` of the moment ends by itself.
            let end = Instant::now() + Duration::from_secs(5);
            while std::fs::remove_dir(&self.path).is_err() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    async fn stops_and_goes_on(counting: &Counting, kind: Kind) {
        let freezer = Freezer::of(counting.child.id(), Path::new("/")).expect("found");
        assert_eq!(
            freezer,
            Freezer {
                path: counting.path.clone(),
                kind
            }
        );
        assert_eq!(freezer.state().expect("known"), State::Thawed);
        assert!(
            processes::in_cgroup(freezer.path())
                .expect("listed")
                .contains(&counting.child.id())
        );
        let took = freezer
            .freeze(Duration::from_secs(10))
            .await
            .expect("frozen");
        assert_eq!(freezer.state().expect("known"), State::Frozen);
        // Generous: the machine may be busy with something else.
        assert!(took < Duration::from_secs(5), "{took:?}");
        println!("{kind:?}: frozen in {took:?}");
        // What was written before it stopped may still be under way.
        while counting.counts(Duration::from_millis(50)) {}
        assert!(
            !counting.counts(Duration::from_millis(200)),
            "it goes on counting"
        );
        freezer
            .freeze(Duration::from_secs(10))
            .await
            .expect("frozen already");
        freezer.thaw().expect("thawed");
        freezer.thaw().expect("thawed again");
        assert!(
            counting.counts(Duration::from_secs(10)),
            "it has not gone on"
        );
        assert_eq!(freezer.state().expect("known"), State::Thawed);
    }

    fn mounted(kind: Kind) -> Option<PathBuf> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("read");
        let found = hierarchies(&mounts)
            .into_iter()
            .find(|(found, _)| *found == kind);
        found.map(|(_, mount)| mount.at)
    }

    #[tokio::test]
    async fn processes_stop_and_go_on() {
        let mount = mounted(Kind::Unified).expect("a cgroup v2 mount: this test needs one");
        let counting = Counting::start(&mount, "v2");
        stops_and_goes_on(&counting, Kind::Unified).await;
    }

    #[test]
    fn processes_that_are_elsewhere_are_gathered() {
        let mount = mounted(Kind::Unified).expect("a cgroup v2 mount: this test needs one");
        let path = mount.join(format!("livemig-test-gather-{}", std::process::id()));
        std::fs::create_dir(&path).expect("made: this test needs root");
        // What it starts before it goes in stays where it was.
        let script = "sleep 60 & echo $$ >$0/cgroup.procs; echo $!; wait";
        let mut first = Command::new("sh")
            .args(["-c", script])
            .arg(&path)
            .stdout(Stdio::piped())
            .spawn()
            .expect("started");
        let mut line = String::new();
        BufReader::new(first.stdout.take().expect("piped"))
            .read_line(&mut line)
            .expect("it says who the other is");
        let mut both = [first.id(), line.trim().parse().expect("a process")];
        both.sort_unstable();
        let freezer = Freezer {
            path: path.clone(),
            kind: Kind::Unified,
        };
        let inside = || processes::in_cgroup(&path).expect("listed");
        let before = inside();
        let moved = [(); 2].map(|()| freezer.gather(first.id(), Path::new("/")));
        let after = inside();
        for pid in both {
            let pid = rustix::process::Pid::from_raw(pid.cast_signed()).expect("not 0");
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("killed");
        }
        first.wait().expect("waited");
        let end = Instant::now() + Duration::from_secs(5);
        while std::fs::remove_dir(&path).is_err() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(before, [first.id()]);
        assert_eq!(moved.map(|moved| moved.expect("moved")), [1, 0]);
        assert_eq!(after, both);
    }

    #[tokio::test]
    async fn nobody_waits_for_a_child_while_frozen() {
        let mount = mounted(Kind::Unified).expect("a cgroup v2 mount: this test needs one");
        let path = mount.join(format!("livemig-test-vfork-{}", std::process::id()));
        std::fs::create_dir(&path).expect("made: this test needs root");
        // Two shells that start one program after the other: sh does that with vfork(2).
        let script = "echo $$ >$0/cgroup.procs; while :; do /bin/true; done";
        let start = |_| Command::new("sh").args(["-c", script]).arg(&path).spawn();
        let mut shells = [0, 1].map(|number| start(number).expect("started"));
        let freezer = Freezer {
            path: path.clone(),
            kind: Kind::Unified,
        };
        let mut waiting = 0;
        for _ in 0..50 {
            tokio::time::sleep(Duration::from_millis(3)).await;
            freezer
                .freeze(Duration::from_secs(5))
                .await
                .expect("frozen");
            waiting += u32::from(freezer.waits_for_a_child().expect("read"));
            freezer.thaw().expect("thawed");
        }
        for shell in &mut shells {
            shell.kill().expect("killed");
            shell.wait().expect("waited");
        }
        let end = Instant::now() + Duration::from_secs(5);
        while std::fs::remove_dir(&path).is_err() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(waiting, 0);
    }

    /// On systems that have no v1 freezer there is nothing of it to test.
    #[tokio::test]
    async fn processes_stop_and_go_on_with_the_old_freezer() {
        let Some(mount) = mounted(Kind::Legacy) else {
            println!("no v1 freezer is mounted here");
            return;
        };
        let counting = Counting::start(&mount, "v1");
        stops_and_goes_on(&counting, Kind::Legacy).await;
    }

    #[tokio::test]
    async fn processes_that_do_not_stop_in_time_are_let_go() {
        let mount = mounted(Kind::Unified).expect("a cgroup v2 mount: this test needs one");
        let counting = Counting::start(&mount, "late");
        let freezer = Freezer {
            path: counting.path.clone(),
            kind: Kind::Unified,
        };
        // No time at all, so that nothing can have stopped yet; or it has, and that is fine too.
        match freezer.freeze(Duration::ZERO).await {
            Err(Error::NotFrozen { .. }) => {
                assert!(
                    counting.counts(Duration::from_secs(10)),
                    "it has not gone on"
                );
                assert_eq!(freezer.state().expect("known"), State::Thawed);
            }
            Ok(_) => assert_eq!(freezer.state().expect("known"), State::Frozen),
            Err(error) => panic!("{error}"),
        }
    }
}
