//! Two hosts, a container on the first, a client with one connection; and what is to be seen of them
//! after a fault.

use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use futures::FutureExt;
use serde_json::Value;

use super::fault::Fault;
use super::lab::pair::Pair;
use super::lab::{Census, LOOK, Lab, Output, gate};
use super::moment::{Moment, Move};

pub const NAME: &str = "web";

/// What runs in the container.
#[derive(Debug, Clone, Copy)]
pub struct Furniture {
    podman: &'static [&'static str],
    workload: &'static [&'static str],
}

/// An echo server.
pub const TCP: Furniture = Furniture {
    podman: &["-p", "7000:7000"],
    workload: &["echo", "7000"],
};

/// Two of them.
pub const TCP_AND_UDP: Furniture = Furniture {
    podman: &[
        "-p",
        "7000:7000",
        "-p",
        "7001:7001/udp",
        "--entrypoint",
        "/bin/sh",
    ],
    workload: &["-c", "/workload udp-echo 7001 & exec /workload echo 7000"],
};

/// How long what passes may take to pass: processes that end, Podman's own clean-up.
const SETTLES: Duration = Duration::from_secs(15);

/// How long the client waits for its last answer, in milliseconds: after a long silence TCP tries again
/// after up to 120 s (`TCP_RTO_MAX` in the kernel's `include/net/tcp.h`).
pub const GRACE_MS: &str = "130000";

/// Small enough to be filled, large enough for what Podman does here.
const STORAGE: &str = "200m";

/// Hosts as they are when nothing is under way.
pub struct Scene {
    engine: &'static str,
    furniture: Furniture,
    pub pair: Pair,
    /// Without the container.
    empty: [Census; 2],
    /// With it, on the first.
    pub furnished: [Census; 2],
}

/// What became of a cell.
#[derive(Debug)]
pub struct Seen {
    /// What the migration ended with.
    pub exit: String,
    /// Where the container runs: what Podman says and what processes there are agree.
    pub runs_on: Vec<String>,
    /// What became of the client's connection.
    pub connection: String,
    pub longest_gap_ms: f64,
    /// What is on the hosts that was not, and the other way round.
    pub leftovers: Vec<String>,
    /// What the driver itself could not do, or found to be impossible.
    pub failure: Option<String>,
}

/// Strikes one migration. The scene is given back if it can be used again.
pub async fn strike(
    scene: Option<Scene>,
    engine: &'static str,
    moment: Moment,
    fault: Fault,
) -> (Option<Scene>, Seen) {
    let mut scene = match scene {
        Some(scene) if scene.engine == engine => scene,
        other => {
            if let Some(other) = other {
                other.end().await;
            }
            Scene::set(engine, TCP).await
        }
    };
    let outcome = AssertUnwindSafe(scene.cell(moment, fault))
        .catch_unwind()
        .await;
    match outcome {
        Ok((seen, true)) => (Some(scene), seen),
        Ok((seen, false)) => (None, seen),
        Err(panic) => {
            let failure = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                .unwrap_or_else(|| "the driver failed".to_owned());
            let seen = Seen {
                exit: "?".to_owned(),
                runs_on: Vec::new(),
                connection: "unknown".to_owned(),
                longest_gap_ms: 0.0,
                leftovers: Vec::new(),
                failure: Some(failure),
            };
            (None, seen)
        }
    }
}

impl Scene {
    pub async fn set(engine: &'static str, furniture: Furniture) -> Scene {
        let lab = Lab::builder(2).storage_size(STORAGE);
        let pair = match engine {
            "rest" => Pair::of(lab).await,
            _ => Pair::direct(lab).await,
        };
        for number in [1, 2] {
            let host = pair.host(number);
            // These stay, whatever is tried.
            host.sh(
                "mkdir -p /run/livemig/hops /run/livemig/staging /run/livemig/runtime \
                     /var/lib/livemig/journal/outgoing /var/lib/livemig/journal/incoming;
                 touch /run/livemig/hops/interfaces.lock /run/livemig/hops/records.lock",
            )
            .await;
            gate::install(host).await;
            settle_podman(&pair, number, furniture).await;
        }
        let empty = [pair.host(1).census().await, pair.host(2).census().await];
        let furnished = empty.clone();
        let mut scene = Scene {
            engine,
            furniture,
            pair,
            empty,
            furnished,
        };
        scene.furnish().await;
        scene
    }

    /// The container is started on the first host.
    async fn furnish(&mut self) {
        let own = self.pair.host(1);
        own.run_workload(NAME, self.furniture.podman, self.furniture.workload)
            .await;
        self.furnished = [own.census().await, self.pair.host(2).census().await];
    }

    pub async fn end(self) {
        self.pair.down().await;
    }

    /// One cell, and whether the hosts are as they were.
    async fn cell(&mut self, moment: Moment, fault: Fault) -> (Seen, bool) {
        let address = self.pair.host(1).ip();
        let client = self
            .pair
            .client(1)
            .spawn(&[
                "client-echo",
                &address,
                "7000",
                "--every-ms",
                "5",
                "--grace-ms",
                GRACE_MS,
            ])
            .await;
        let what = Move {
            engine: self.engine,
            container: NAME,
            from: 1,
            to: 2,
        };
        let migration = moment.reach(&self.pair, what).await;
        let ended = fault.strike(moment, &mut self.pair, what, migration).await;
        let recovered = self
            .pair
            .host(1)
            .try_exec(&["livemig", "--json", "recover"])
            .await;
        let runs_on = self.where_it_runs().await;
        let report = client.stop().await;
        let (leftovers, reusable) = self.left(&runs_on).await;
        let failure = (!recovered.status.success())
            .then(|| format!("recover: {recovered}\nmigrate: {ended}"));
        let seen = Seen {
            exit: exit(&ended),
            runs_on,
            connection: connection(&report),
            longest_gap_ms: report["longest_gap_ms"].as_f64().unwrap_or(f64::NAN),
            leftovers,
            failure,
        };
        if seen.is_bad() {
            eprintln!("{ended}\n{recovered}\n{report}");
            for host in [1, 2] {
                let agent = self.pair.agent(host);
                eprintln!(
                    "--- agent of h{host} ---\n{}{}",
                    agent.stdout(),
                    agent.stderr()
                );
            }
        }
        (seen, reusable)
    }

    /// The hosts on which it runs, once they are one; or as they are when that takes too long.
    pub async fn where_it_runs(&self) -> Vec<String> {
        let began = Instant::now();
        loop {
            let mut on = Vec::new();
            for number in [1, 2] {
                let host = self.pair.host(number);
                let told = host.container_state(NAME).await.as_deref() == Some("running");
                let processes = host.sh(PROCESSES).await.text() == "1";
                match (told, processes) {
                    (true, true) => on.push(host.name().to_owned()),
                    (false, false) => {}
                    (true, false) => on.push(format!("{} says its Podman", host.name())),
                    (false, true) => on.push(format!("{} unknown to its Podman", host.name())),
                }
            }
            if (on.len() == 1 && on[0].len() == 2) || began.elapsed() >= SETTLES {
                return on;
            }
            tokio::time::sleep(LOOK * 5).await;
        }
    }

    /// What is left on the hosts, and whether they can be used again.
    async fn left(&mut self, runs_on: &[String]) -> (Vec<String>, bool) {
        let mut left = self.unfinished().await;
        if runs_on == ["h1"] {
            left.extend(self.beside_the_furniture().await);
            let clean = left.is_empty();
            return (left, clean);
        }
        // It has moved, or nobody knows: without it, both hosts have to be empty.
        for number in [1, 2] {
            let host = self.pair.host(number);
            host.sh(&format!(
                "podman rm -f -t 0 {NAME} || true; conntrack -D -p tcp --dport 7000 2>/dev/null || true"
            ))
            .await;
        }
        left.extend(
            self.settle(async |scene: &Scene| scene.differences(&scene.empty).await)
                .await,
        );
        let clean = left.is_empty() && runs_on == ["h2"];
        if clean {
            self.furnish().await;
        }
        (left, clean)
    }

    /// What is on the hosts that was not when the container was started on the first, and the other way
    /// round.
    pub async fn beside_the_furniture(&self) -> Vec<String> {
        self.settle(async |scene: &Scene| scene.differences(&scene.furnished).await)
            .await
    }

    /// Journals and locks of migrations that have ended.
    pub async fn unfinished(&self) -> Vec<String> {
        self.settle(async |scene: &Scene| scene.journals().await)
            .await
    }

    /// Looks until there is nothing to be seen, or it stays.
    async fn settle(&self, look: impl AsyncFn(&Scene) -> Vec<String>) -> Vec<String> {
        let began = Instant::now();
        loop {
            let seen = look(self).await;
            if seen.is_empty() || began.elapsed() >= SETTLES {
                return seen;
            }
            tokio::time::sleep(LOOK * 10).await;
        }
    }

    async fn journals(&self) -> Vec<String> {
        let mut left = Vec::new();
        for number in [1, 2] {
            let host = self.pair.host(number);
            let files = host
                .sh("find /var/lib/livemig/journal -type f; find /run/livemig -maxdepth 1 -name '*.lock'")
                .await;
            left.extend(
                files
                    .text()
                    .lines()
                    .map(|line| format!("{}: + {line}", host.name())),
            );
        }
        left
    }

    async fn differences(&self, before: &[Census; 2]) -> Vec<String> {
        let mut left = Vec::new();
        for (number, before) in [1, 2].into_iter().zip(before) {
            let host = self.pair.host(number);
            let difference = before.difference(&host.census().await).unwrap_or_default();
            let mut section = "";
            for line in difference.lines() {
                match line.strip_prefix("  ") {
                    Some(line) => left.push(format!("{}: {section} {line}", host.name())),
                    None => section = line,
                }
            }
        }
        left
    }
}

/// How many processes of the container are there that are not frozen.
const PROCESSES: &str = r#"
count=0
for pid in $(ps -eo pid=,args= | awk '$2 == "/workload" && $3 == "echo" { print $1 }'); do
    cgroup=$(sed -n 's/^0:://p' /proc/$pid/cgroup) || continue
    grep -q 'frozen 1' "/sys/fs/cgroup$cgroup/cgroup.events" || count=$((count + 1))
done
echo $count"#;

impl Seen {
    /// Whether anything is not as it has to be.
    pub fn is_bad(&self) -> bool {
        self.runs_on.len() != 1
            || self.connection != "went on"
            || !self.leftovers.is_empty()
            || self.failure.is_some()
    }
}

/// What Podman leaves behind of the first container that has such ports is not a migration's.
async fn settle_podman(pair: &Pair, number: usize, furniture: Furniture) {
    let ports: Vec<&str> = furniture
        .podman
        .chunks(2)
        .filter(|option| option[0] == "-p")
        .flatten()
        .copied()
        .collect();
    pair.settled(number, &ports).await;
}

pub fn exit(ended: &Output) -> String {
    match ended.status.code() {
        Some(code) => code.to_string(),
        None => "killed".to_owned(),
    }
}

pub fn connection(report: &Value) -> String {
    let right = report["wrong"] == 0
        && report["resets"] == 0
        && report["unanswered"] == 0
        && report["same_socket"] == true
        && report["replies"].as_u64() > Some(0);
    if right { "went on" } else { "lost" }.to_owned()
}
