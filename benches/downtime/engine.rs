//! The ways in which the container is moved.
//!
//! - *naive*: `naive/*.sh`, what a careful operator does with Podman's command, nftables,
//!   conntrack-tools and routes: drop what comes in, checkpoint, copy, restore, route, let it in again.
//!   The copy is `cat` into a TCP connection (bash's `/dev/tcp`) and busybox's `nc` at the other end;
//!   flows are listed while the checkpoint runs; the way between the hosts is a plain route. No SSH,
//!   no tunnel, no polling: each could only be slower.
//! - *rest*: `livemig migrate` on hosts without any set-up. It also sets up its tunnel, for none is there.
//! - *direct*: the same on hosts with `livemig setup`; *postcopy* with `--post-copy` too.
//! - *floor*: `floor.sh`: `runc checkpoint` and `runc restore` of the same container on the same host,
//!   through a tmpfs, the client's packets held meanwhile. Nothing is moved. No engine that has runc
//!   and CRIU do their work one after the other gets below.

use std::fmt;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::lab::{Lab, Node, Output, Process};
use crate::record::number;

const SOURCE: &str = include_str!("naive/source.sh");
const DESTINATION: &str = include_str!("naive/destination.sh");
const FLOOR: &str = include_str!("floor.sh");

/// The container that is moved.
pub const CONTAINER: &str = "web";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    Naive,
    Rest,
    Direct,
    Postcopy,
    Floor,
}

impl Engine {
    pub const ALL: [Engine; 5] = [
        Engine::Naive,
        Engine::Rest,
        Engine::Direct,
        Engine::Postcopy,
        Engine::Floor,
    ];

    /// The name that results have.
    pub fn name(self) -> &'static str {
        match self {
            Engine::Naive => "naive",
            Engine::Rest => "rest",
            Engine::Direct => "direct",
            Engine::Postcopy => "postcopy",
            Engine::Floor => "floor",
        }
    }

    /// The host that has the container afterwards.
    pub fn ends_at(self) -> usize {
        match self {
            Engine::Floor => 1,
            _ => 2,
        }
    }

    fn wants_setup(self) -> bool {
        matches!(self, Engine::Direct | Engine::Postcopy)
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Which of the engines this livemig has, by its own word.
#[derive(Debug, Clone, Copy)]
pub struct Known {
    /// `migrate --engine`: direct, and by its name rest.
    pub direct: bool,
    /// `migrate --post-copy`.
    pub postcopy: bool,
}

impl Known {
    /// Asks for the help.
    pub async fn ask() -> Known {
        let lab = Lab::builder(1).clients(0).up().await;
        let help = lab.host(1).exec(&["livemig", "migrate", "--help"]).await;
        let known = Known {
            direct: help.stdout.contains("--engine"),
            postcopy: help.stdout.contains("--post-copy"),
        };
        lab.down().await;
        known
    }

    pub fn has(self, engine: Engine) -> bool {
        match engine {
            Engine::Direct => self.direct,
            Engine::Postcopy => self.postcopy,
            Engine::Naive | Engine::Rest | Engine::Floor => true,
        }
    }
}

/// Two fresh hosts and a client. The source may send to the destination.
#[derive(Debug)]
pub struct Hosts {
    // Before the lab: it ends before that does.
    agent: Process,
    pub lab: Lab,
    known: Known,
}

/// What an engine has to say of a move.
#[derive(Debug)]
pub struct Moved {
    /// The wall clock around the one command at the source.
    pub total: Duration,
    /// Everything else, for the run's record.
    pub figures: Value,
}

impl Hosts {
    pub async fn up(known: Known, engine: Engine) -> Hosts {
        let lab = Lab::new(2).await;
        let (source, destination) = (lab.host(1), lab.host(2));
        if engine.wants_setup() {
            for host in [source, destination] {
                host.exec(&["livemig", "setup"]).await;
                // It reads its configuration when it starts.
                host.podman_service("restart").await;
            }
        }
        // Also where it has nothing to do: whatever it costs, it costs all.
        let agent = destination.spawn_command(&["livemig", "agent"]);
        agent.wait_for("listening on").await;
        let token = destination
            .exec(&["livemig", "invite", "--address", &destination.ip()])
            .await;
        source
            .exec(&["livemig", "join", token.text(), "--name", "h2"])
            .await;
        Hosts { agent, lab, known }
    }

    pub async fn down(self) {
        drop(self.agent);
        self.lab.down().await;
    }

    /// Moves the container to the other host, or, for the floor, to where it is.
    pub async fn migrate(&self, engine: Engine) -> Moved {
        let (source, destination) = (self.lab.host(1), self.lab.host(2));
        match engine {
            Engine::Naive => naive(source, destination).await,
            Engine::Rest if !self.known.direct => livemig(source, &[]).await,
            Engine::Rest => livemig(source, &["--engine", "rest"]).await,
            Engine::Direct => livemig(source, &["--engine", "direct"]).await,
            Engine::Postcopy => livemig(source, &["--engine", "direct", "--post-copy"]).await,
            Engine::Floor => floor(source).await,
        }
    }
}

async fn naive(source: &Node, destination: &Node) -> Moved {
    let format = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
    let address = source
        .exec(&["podman", "inspect", "--format", format, CONTAINER])
        .await;
    let address = address.text();
    let receiving =
        destination.spawn_command(&["bash", "-c", DESTINATION, "naive", address, &source.ip()]);
    receiving.wait_for("ready").await;

    let arguments = [CONTAINER, address, &destination.ip()];
    let mut command = vec!["bash", "-c", SOURCE, "naive"];
    command.extend(arguments);
    let begin = Instant::now();
    let sent = source.try_exec(&command).await;
    let total = begin.elapsed();
    succeeded(&sent);
    let received = receiving.finish().await;
    succeeded(&received);
    let (sent, received) = (sent.json(), received.json());
    // `--print-stats` gives a list: one container each.
    let checkpoint = &sent["checkpoint"]["container_statistics"][0];
    let restore = &received["restore"]["container_statistics"][0];
    let figures = json!({
        "bytes_sent": sent["bytes_sent"],
        "frozen_ms": milliseconds(&sent["frozen_us"]),
        "flows": received["flows"],
        "podman_checkpoint_ms": milliseconds(&sent["checkpoint"]["podman_checkpoint_duration"]),
        "runtime_checkpoint_ms": milliseconds(&checkpoint["runtime_checkpoint_duration"]),
        "criu_frozen_ms": milliseconds(&checkpoint["criu_statistics"]["frozen_time"]),
        "podman_restore_ms": milliseconds(&received["restore"]["podman_restore_duration"]),
        "runtime_restore_ms": milliseconds(&restore["runtime_restore_duration"]),
        "criu_restore_ms": milliseconds(&restore["criu_statistics"]["restore_time"]),
    });
    Moved { total, figures }
}

async fn livemig(source: &Node, options: &[&str]) -> Moved {
    let mut command = vec!["livemig", "--json", "migrate", CONTAINER, "--to", "h2"];
    command.extend(options);
    let begin = Instant::now();
    let migrated = source.try_exec(&command).await;
    let total = begin.elapsed();
    succeeded(&migrated);
    let last = migrated.stdout.lines().last().unwrap_or_default();
    let last: Value = serde_json::from_str(last).expect("the last line is the report");
    let report = &last["report"];
    let figures = json!({
        "bytes_sent": report["bytes_sent"],
        "frozen_ms": report["frozen_ms"],
        "engine": report["engine"],
        "flows": report["flows"].as_array().map(Vec::len),
        "downtime_ms": report["downtime_ms"],
        "phases": report["phases"],
        "breakdown": report["breakdown"],
        "unread_ms": report["unread_ms"],
        "reported_peak_extra_mib": report["peak_extra_mib"],
        "dump": report["dump"],
    });
    Moved { total, figures }
}

async fn floor(source: &Node) -> Moved {
    let done = source
        .exec(&["bash", "-c", FLOOR, "floor", CONTAINER])
        .await
        .json();
    let parts = [&done["checkpoint_us"], &done["restore_us"]];
    let figures = json!({
        "bytes_sent": 0,
        "image_bytes": done["image_bytes"],
        "frozen_ms": milliseconds(&done["frozen_us"]),
        "runc_checkpoint_ms": milliseconds(parts[0]),
        "runc_restore_ms": milliseconds(parts[1]),
    });
    let total = parts.map(number).iter().sum::<f64>();
    Moved {
        total: Duration::from_secs_f64(total / 1e6),
        figures,
    }
}

fn succeeded(output: &Output) {
    assert!(output.status.success(), "{output}");
}

/// Of microseconds.
fn milliseconds(value: &Value) -> Value {
    json!(number(value) / 1e3)
}
