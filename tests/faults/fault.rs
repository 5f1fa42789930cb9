//! What is broken, how, and how it is mended.

use std::time::{Duration, Instant};

use super::lab::pair::Pair;
use super::lab::{LOOK, Node, Output, Process, gate, link};
use super::moment::{Moment, Move, WayOn};
use rustix::process::Signal;

/// The longest time that a migration may take to end: a destination that is gone is asked for a minute
/// whether it has given up its copy, and a stream that stalls has its own bounds before.
const LONGEST: Duration = Duration::from_secs(400);

/// Something that breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// `livemig migrate` is killed.
    SourceKilled,
    /// It is, and so is `livemig recover`, again and again, later each time.
    RecoveryKilled,
    /// The destination's agent is killed, and started again.
    AgentKilled,
    /// Both are.
    BothKilled,
    /// Podman's service at the source is killed, and started again.
    SourcePodmanKilled,
    /// Podman's service at the destination is.
    DestinationPodmanKilled,
    /// Nothing passes between the hosts for so long.
    LinkCut(u64),
    /// Nothing passes until the migration has ended.
    LinkCutForGood,
    /// The link between the hosts is slow, and drops and duplicates packets.
    LinkBad,
    /// No file of the source can grow.
    SourceDiskFull,
    /// No file of the destination can.
    DestinationDiskFull,
    /// CRIU fails, to dump or to restore.
    CriuFails,
    /// The runtime and CRIU get no more memory.
    MemoryLimit,
    /// Ctrl-C.
    CtrlC,
    /// Ctrl-C, and once more.
    CtrlCTwice,
}

impl Fault {
    /// All of them.
    pub const ALL: [Fault; 16] = [
        Fault::SourceKilled,
        Fault::RecoveryKilled,
        Fault::AgentKilled,
        Fault::BothKilled,
        Fault::SourcePodmanKilled,
        Fault::DestinationPodmanKilled,
        Fault::LinkCut(1),
        Fault::LinkCut(30),
        Fault::LinkCutForGood,
        Fault::LinkBad,
        Fault::SourceDiskFull,
        Fault::DestinationDiskFull,
        Fault::CriuFails,
        Fault::MemoryLimit,
        Fault::CtrlC,
        Fault::CtrlCTwice,
    ];

    /// As it stands in `LIVEMIG_FAULTS` and in the table.
    pub fn name(self) -> &'static str {
        match self {
            Fault::SourceKilled => "source-killed",
            Fault::RecoveryKilled => "recovery-killed",
            Fault::AgentKilled => "agent-killed",
            Fault::BothKilled => "both-killed",
            Fault::SourcePodmanKilled => "source-podman-killed",
            Fault::DestinationPodmanKilled => "destination-podman-killed",
            Fault::LinkCut(1) => "link-cut-1s",
            Fault::LinkCut(_) => "link-cut-30s",
            Fault::LinkCutForGood => "link-cut-for-good",
            Fault::LinkBad => "link-bad",
            Fault::SourceDiskFull => "source-disk-full",
            Fault::DestinationDiskFull => "destination-disk-full",
            Fault::CriuFails => "criu-fails",
            Fault::MemoryLimit => "memory-limit",
            Fault::CtrlC => "ctrl-c",
            Fault::CtrlCTwice => "ctrl-c-twice",
        }
    }

    /// Whether there is something for it to break: CRIU works in two moments only.
    pub fn can_strike(self, moment: Moment) -> bool {
        match self {
            Fault::CriuFails | Fault::MemoryLimit => {
                matches!(moment, Moment::Freeze | Moment::Restore)
            }
            _ => true,
        }
    }

    /// Whether it is mostly waited for.
    pub fn takes_long(self) -> bool {
        matches!(self, Fault::LinkCut(30) | Fault::LinkCutForGood)
    }

    /// Strikes a migration that stands at a moment, lets it go on, and mends what is broken when it has
    /// ended. Returns what it said at its end.
    pub async fn strike(
        self,
        moment: Moment,
        pair: &mut Pair,
        what: Move,
        migration: Process,
    ) -> Output {
        let way_on = moment.way_on(pair, what);
        let [source, destination] = [what.from, what.to].map(|host| pair.host(host).clone());
        let wan = pair.lab().wan().clone();
        // Where CRIU is about to work.
        let at_work = if moment == Moment::Freeze {
            &source
        } else {
            &destination
        };
        match self {
            Fault::SourceKilled => {
                let killed = kill(migration).await;
                way_on.open(None).await;
                killed
            }
            Fault::RecoveryKilled => {
                let killed = kill(migration).await;
                way_on.open(None).await;
                for after in [20, 60, 120, 250] {
                    let recovery = source.spawn_command(&["livemig", "recover"]);
                    tokio::time::sleep(Duration::from_millis(after)).await;
                    recovery.kill().await;
                }
                killed
            }
            Fault::BothKilled => {
                let killed = kill(migration).await;
                // The new agent may have to wait for what stands at the moment.
                tokio::join!(pair.replace_agent(what.to), way_on.open(None));
                killed
            }
            Fault::AgentKilled => {
                tokio::join!(pair.replace_agent(what.to), way_on.open(Some(&migration)));
                migration.finish_within(LONGEST).await
            }
            Fault::SourcePodmanKilled => {
                restart_podman(&source).await;
                go_on(&way_on, migration).await
            }
            Fault::DestinationPodmanKilled => {
                restart_podman(&destination).await;
                go_on(&way_on, migration).await
            }
            Fault::LinkCut(seconds) => {
                link::cut(&wan).await;
                way_on.open(Some(&migration)).await;
                tokio::time::sleep(Duration::from_secs(seconds)).await;
                link::mend(&wan).await;
                migration.finish_within(LONGEST).await
            }
            Fault::LinkCutForGood => {
                link::cut(&wan).await;
                let ended = go_on(&way_on, migration).await;
                link::mend(&wan).await;
                ended
            }
            Fault::LinkBad => {
                link::spoil(&wan).await;
                let ended = go_on(&way_on, migration).await;
                link::mend(&wan).await;
                ended
            }
            Fault::SourceDiskFull | Fault::DestinationDiskFull => {
                let full = if self == Fault::SourceDiskFull {
                    &source
                } else {
                    &destination
                };
                fill(full).await;
                let ended = go_on(&way_on, migration).await;
                empty(full).await;
                ended
            }
            Fault::CriuFails => {
                gate::break_criu(at_work).await;
                let ended = go_on(&way_on, migration).await;
                gate::mend_criu(at_work).await;
                ended
            }
            Fault::MemoryLimit => {
                let limit = limit::Limit::of(at_work, moment.gate(what));
                let ended = go_on(&way_on, migration).await;
                drop(limit);
                ended
            }
            Fault::CtrlC => {
                migration.signal(Signal::INT);
                go_on(&way_on, migration).await
            }
            Fault::CtrlCTwice => {
                migration.signal(Signal::INT);
                way_on.open(Some(&migration)).await;
                // It may be past caring for the first one, and at its end.
                let began = Instant::now();
                while !migration.stdout().contains("rolling-back")
                    && began.elapsed() < Duration::from_millis(500)
                {
                    tokio::time::sleep(LOOK / 4).await;
                }
                migration.signal(Signal::INT);
                migration.finish_within(LONGEST).await
            }
        }
    }
}

async fn go_on(way_on: &WayOn, migration: Process) -> Output {
    way_on.open(Some(&migration)).await;
    migration.finish_within(LONGEST).await
}

async fn kill(migration: Process) -> Output {
    migration.signal(Signal::KILL);
    // What stands still dies, but whoever waits for it may stand still as well.
    migration.go_on();
    migration.finish().await
}

/// As systemd does it: killed, it is there again for the next one who asks.
async fn restart_podman(host: &Node) {
    gate::signal_podman(host, "KILL").await;
    host.podman_service("start").await;
}

/// The file systems of a host that livemig and Podman write to, which are small here for that.
async fn fill(host: &Node) {
    host.sh("for at in / /var/lib/containers; do
            free=$(df --output=avail -k $at | tail -n1)
            [ $free -eq 0 ] || fallocate -l ${free}K $at/full
        done
        # In memory, and large: made smaller instead.
        used=$(df --output=used -k /run | tail -n1)
        mount -o remount,size=$((used))k /run")
        .await;
}

async fn empty(host: &Node) {
    host.sh("rm -f /full /var/lib/containers/full; mount -o remount,size=50% /run")
        .await;
}

/// A memory cgroup around what stands at a gate.
mod limit {
    use std::path::{Path, PathBuf};

    use super::Node;

    /// Less than CRIU alone needs, in bytes.
    const BYTES: &str = "1048576";

    /// The cgroup, removed when dropped.
    pub struct Limit(PathBuf);

    impl Limit {
        /// Puts the process that waits at this gate into a cgroup that has no memory to give.
        pub fn of(host: &Node, verb: &str) -> Limit {
            let written = std::fs::read_to_string(host.path(&format!("/run/gate-{verb}.here")))
                .expect("somebody waits at the gate");
            let pid = outer(host, written.trim());
            // Version 1 beside version 2, or version 2 alone.
            let v1 = Path::new("/sys/fs/cgroup/memory");
            let (parent, bound) = if v1.is_dir() {
                (v1.to_owned(), "memory.limit_in_bytes")
            } else {
                let own = std::fs::read_to_string(format!("/proc/{}/cgroup", host.pid()))
                    .expect("a host has a cgroup");
                let own = own.trim().trim_start_matches("0::/").to_owned();
                let own = Path::new("/sys/fs/cgroup").join(own);
                let node = own.parent().expect("a host's cgroup is below another");
                (node.to_owned(), "memory.max")
            };
            let cgroup = parent.join(format!("livemig-fault-{}", std::process::id()));
            std::fs::create_dir_all(&cgroup).expect("the memory cgroup can be made");
            let write = |file: &str, text: &str| {
                std::fs::write(cgroup.join(file), text)
                    .unwrap_or_else(|error| panic!("{}: {file}: {error}", cgroup.display()));
            };
            write(bound, BYTES);
            write("cgroup.procs", &pid.to_string());
            Limit(cgroup)
        }
    }

    impl Drop for Limit {
        fn drop(&mut self) {
            for _ in 0..100 {
                // It can go when the last of them is dead.
                if std::fs::remove_dir(&self.0).is_ok() {
                    return;
                }
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            eprintln!("{} is still in use", self.0.display());
        }
    }

    /// What a process is called here that is called `inner` in a host.
    fn outer(host: &Node, inner: &str) -> u32 {
        let namespace = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let of_host = namespace(host.pid());
        let processes = std::fs::read_dir("/proc")
            .expect("there is /proc")
            .flatten();
        processes
            .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
            .filter(|pid| namespace(*pid) == of_host)
            .find(|pid| {
                let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
                let status = status.unwrap_or_default();
                let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
                numbers.and_then(|all| all.split_whitespace().last()) == Some(inner)
            })
            .unwrap_or_else(|| panic!("{} has no process {inner}", host.name()))
    }
}
