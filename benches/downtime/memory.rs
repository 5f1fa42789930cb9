//! What a migration costs in memory while it lasts, on both hosts.
//!
//! Each host of the lab is a memory cgroup, so the kernel counts for us whatever is there, and whoever
//! made it: livemig, its agent, Podman, CRIU, shell; processes' own memory and files on tmpfs, unlinked
//! ones too. From that the container's own memory is taken off, wherever it has some at the time. What
//! is left, less what was left before, is *extra*; its peak is what a host must have to spare. The file
//! cache, which the kernel gives back when it is asked to, and its own buffers (sockets, pipes) are not
//! in it. It is looked at every 20 ms: what comes and goes in between is not seen.
//!
//! A process that ends has no memory of its own any more while the kernel is still busy giving it back,
//! so what the container had a moment ago counts as its own.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::lab::Node;

const LOOK: Duration = Duration::from_millis(20);
/// How long the kernel may take to free what a process had.
const MOMENT: Duration = Duration::from_millis(200);
/// Cgroups of Podman's containers, below a host's. Conmon has one too, and is not the container.
const CONTAINER: &str = "libpod-";
const CONMON: &str = "libpod-conmon";

/// Looks at two hosts' memory until it is asked what it has seen.
#[derive(Debug)]
pub struct Watch {
    over: Arc<AtomicBool>,
    thread: JoinHandle<[f64; 2]>,
}

impl Watch {
    /// Begins. What is there now is not extra.
    pub async fn begin(hosts: [&Node; 2]) -> Watch {
        let mut hosts = [Host::of(hosts[0]).await, Host::of(hosts[1]).await];
        let over = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            let before = hosts.each_mut().map(Host::extra);
            let mut peak = before;
            while !ended.load(Ordering::Relaxed) {
                std::thread::sleep(LOOK);
                for (host, peak) in hosts.iter_mut().zip(&mut peak) {
                    *peak = host.extra().max(*peak);
                }
            }
            let mib = |bytes: i64| bytes as f64 / f64::from(1 << 20);
            [mib(peak[0] - before[0]), mib(peak[1] - before[1])]
        });
        Watch { over, thread }
    }

    /// The peaks of both, in MiB.
    pub fn end(self) -> [f64; 2] {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().expect("the thread only reads files")
    }
}

#[derive(Debug)]
struct Host {
    /// `memory.stat` of its cgroup.
    statistics: PathBuf,
    /// Where Podman makes the cgroups of its containers.
    containers: PathBuf,
    /// What containers had, in bytes, in the last moment.
    own: VecDeque<(Instant, i64)>,
}

impl Host {
    async fn of(node: &Node) -> Host {
        Host {
            statistics: node.memory_cgroup().await.join("memory.stat"),
            containers: node.path("/sys/fs/cgroup/libpod_parent"),
            own: VecDeque::new(),
        }
    }

    /// Bytes that are not the container's.
    fn extra(&mut self) -> i64 {
        let text = fs::read_to_string(&self.statistics)
            .unwrap_or_else(|error| panic!("{}: {error}", self.statistics.display()));
        // Version 1 says `total_` for what includes the cgroups below; version 2 always does.
        let of = |names: [&str; 2]| {
            text.lines()
                .filter_map(|line| line.split_once(' '))
                .find(|(name, _)| names.contains(name))
                .and_then(|(_, value)| value.parse::<i64>().ok())
                .unwrap_or_else(|| panic!("{} has no {names:?}", self.statistics.display()))
        };
        let all = of(["total_rss", "anon"]) + of(["total_shmem", "shmem"]);
        let now = Instant::now();
        self.own.retain(|(at, _)| now - *at < MOMENT);
        self.own.push_back((now, self.of_containers()));
        all - self.own.iter().map(|(_, own)| *own).max().unwrap_or(0)
    }

    fn of_containers(&self) -> i64 {
        let name = |path: &Path| {
            path.file_name()
                .map(|name| name.to_string_lossy().into_owned())
        };
        let mut open: Vec<PathBuf> = below(&self.containers)
            .filter(|path| {
                name(path).is_some_and(|n| n.starts_with(CONTAINER) && !n.starts_with(CONMON))
            })
            .collect();
        let mut sum = 0;
        while let Some(cgroup) = open.pop() {
            let processes = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
            // One that ends meanwhile has nothing any more.
            sum += processes.lines().filter_map(own_memory).sum::<i64>();
            open.extend(below(&cgroup));
        }
        sum
    }
}

fn below(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
}

/// A process's memory that no file is behind, and what it has of files on tmpfs, in bytes.
fn own_memory(pid: &str) -> Option<i64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let kib = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim().strip_suffix(" kB")?.trim().parse::<i64>().ok()
    };
    Some((kib("RssAnon:")? + kib("RssShmem:")?) * 1024)
}
