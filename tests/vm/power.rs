//! What a power cut leaves.
//!
//! One machine is cut off once, in the midst of everything: its emulator is killed, and with it goes what the
//! machine had not written to its disk. Five containers are on their way then, three have just moved:
//!
//! | container | its way | the machine without power is | at that moment |
//! | --- | --- | --- | --- |
//! | `frozen` | a → b | the source | the container stands frozen, and nobody has been asked to restore it |
//! | `runs` | a → b | the source | the copy runs, and the source has not heard of it |
//! | `restoring` | b → a | the destination | CRIU is about to restore it |
//! | `heard` | b → a | the destination | the copy runs, and the source is about to let go |
//! | `told` | b → a | the destination | the source has let go, and is about to commit |
//! | `went` | a → b | the source | all is over |
//! | `direct`, `rest` | b → a | the destination | all is over, by this engine |

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::lab::{IMAGE, LOOK, Lab, Node, Output, Workload};
use super::standstill::Move;
use super::{Clock, gate};

/// How long what passes may take to pass.
const SETTLES: Duration = Duration::from_secs(30);

/// A container, and where its server listens.
#[derive(Clone, Copy)]
struct Container {
    name: &'static str,
    port: &'static str,
}

const FROZEN: Container = container("frozen", "7001");
const RUNS: Container = container("runs", "7002");
const WENT: Container = container("went", "7003");
const RESTORING: Container = container("restoring", "7004");
const HEARD: Container = container("heard", "7005");
const TOLD: Container = container("told", "7006");
const DIRECT: Container = container("direct", "7007");
const REST: Container = container("rest", "7008");
const OF_A: [Container; 3] = [FROZEN, RUNS, WENT];
const OF_B: [Container; 5] = [RESTORING, HEARD, TOLD, DIRECT, REST];

const fn container(name: &'static str, port: &'static str) -> Container {
    Container { name, port }
}

/// What is on a host while something is under way, as the host's own tools see it.
const LEFT: &str = r#"set +e
find /var/lib/livemig/journal -type f
find /run/livemig -type f ! -name interfaces.lock ! -name records.lock
find /dev/shm /var/tmp -maxdepth 1 -name 'livemig-*' -o -maxdepth 1 -name 'podman*' -o -maxdepth 1 -name 'checkpoint*'
nft list tables | grep livemig
ip rule | grep -v -e local -e main -e default
ip -br link show type wireguard
pgrep -l criu
pgrep -fl 'livemig (migrate|recover)'
true"#;

/// Cuts the power of `a`, and looks what becomes of everything. `b` knows it as `host-a`.
pub async fn cut_in_the_midst(clock: &Clock, lab: &Lab) {
    println!("\n== a power cut in the midst of eight migrations");
    let (a, b) = (lab.host(1), lab.host(2));
    tokio::join!(gate::install(a), gate::install(b));
    tokio::join!(furnish(clock, a, &OF_A), furnish(clock, b, &OF_B));
    for host in [a, b] {
        // A connection that ends is forgotten, and its tunnel with it.
        host.sh("for end in fin_wait last_ack time_wait close close_wait; do
                sysctl -qw net.netfilter.nf_conntrack_tcp_timeout_$end=2
            done")
            .await;
    }
    // Not to `told`: what its copy had said is lost with it, and a connection that has gone on is then ahead.
    let mut peers = Vec::new();
    for container in [RESTORING, HEARD] {
        peers.push((container, connect(clock, lab, b, container).await));
    }

    let to_b = |container: Container, engine| it(container, a, "host-b", engine);
    let to_a = |container: Container, engine| it(container, b, "host-a", engine);
    let (went, came) = (to_b(WENT, "direct"), to_a(DIRECT, "direct"));
    tokio::join!(went.whole(clock), came.whole(clock));
    let runs = to_b(RUNS, "direct").until(clock, "started:steer").await;
    let heard = to_a(HEARD, "direct").until(clock, "started:steer").await;
    let told = to_a(TOLD, "direct").until(clock, "started:commit").await;
    // With the other engine Podman at the destination would be at work on it all the while, and keep the next
    // one waiting.
    let frozen = to_b(FROZEN, "rest").until(clock, "started:transfer").await;
    // The last that writes to the disk of `a`: what is synced for others must not help it.
    to_a(REST, "rest").whole(clock).await;
    gate::close(a, "criu").await;
    let restoring = to_a(RESTORING, "rest").begin(clock);
    a.sh("until [ -e /run/gate-criu.here ]; do sleep 0.05; done")
        .await;

    clock.step("a", "its power is cut");
    a.cut_power().await;
    drop((frozen, runs));
    clock.step("a", "it comes back");
    a.restore_power().await;
    a.exec(&["systemctl", "is-active", "livemig-agent"]).await;

    clock.step("b", "what stood still goes on");
    to_a(HEARD, "direct").go_on().await;
    to_a(TOLD, "direct").go_on().await;
    // Undone, for the destination knows nothing of it any more; in doubt, for it does not run it any more.
    for (container, migration, code) in [
        (RESTORING, restoring, 5),
        (HEARD, heard, 7),
        (TOLD, told, 7),
    ] {
        let migrated = migration.finish().await;
        clock.show(&format!("{}: {}", container.name, ended(&migrated)));
        assert_eq!(
            migrated.status.code(),
            Some(code),
            "{}: {migrated}",
            container.name
        );
    }
    // Whether each migration was finished; else it was undone.
    recover(clock, a, &[false, true]).await;
    recover(clock, b, &[false, false]).await;
    recover(clock, a, &[]).await;
    recover(clock, b, &[]).await;

    for host in [a, b] {
        clock.step(host.name(), "podman ps --all");
        clock.show(&containers(host).await.join(", "));
    }
    assert_eq!(
        containers(a).await,
        ["direct exited", "frozen exited", "rest exited"],
        "Podman's restart policy decides whether what a power cut has ended runs again"
    );
    assert_eq!(
        containers(b).await,
        [
            "heard running",
            "restoring running",
            "runs running",
            "told running",
            "went running"
        ]
    );
    for (container, peer) in peers {
        let seen = peer.stop().await;
        clock.show(&format!(
            "{}: {} requests, {} replies, {} resets, longest gap {} ms",
            container.name,
            seen["requests"],
            seen["replies"],
            seen["resets"],
            seen["longest_gap_ms"]
        ));
        for nothing in ["wrong", "resets", "unanswered"] {
            assert_eq!(seen[nothing], 0, "{}: {seen:#}", container.name);
        }
        assert_eq!(seen["same_socket"], true, "{}: {seen:#}", container.name);
    }
    clock.step(
        "a",
        "podman start; what the containers had written before they moved",
    );
    for (host, containers) in [(a, &[FROZEN, DIRECT, REST][..]), (b, &[RUNS, WENT])] {
        for Container { name, .. } in containers {
            let kept = host.sh(&format!(
                "podman start {name} >&2; podman exec {name} cat /kept /data/kept"
            ));
            assert_eq!(kept.await.text(), format!("of {name}\nof {name}"));
        }
    }

    for (host, containers) in [
        (a, &[FROZEN, DIRECT, REST][..]),
        (b, &[RESTORING, HEARD, TOLD, RUNS, WENT]),
    ] {
        for Container { name, .. } in containers {
            host.exec(&["podman", "rm", "--force", "--volumes", "--time", "0", name])
                .await;
        }
    }
    for host in [a, b] {
        clock.step(host.name(), "what is left of it");
        nothing_is_left(host).await;
    }
}

fn it<'a>(container: Container, from: &'a Node, to: &'a str, engine: &'a str) -> Move<'a> {
    Move {
        container: container.name,
        from,
        to,
        engine,
    }
}

/// Each with a file that it has written, to its root and to a volume.
async fn furnish(clock: &Clock, host: &Node, containers: &[Container]) {
    for Container { name, port } in containers {
        clock.step(
            host.name(),
            &format!("podman run --name {name} -p {port}:{port}"),
        );
        host.sh(&format!(
            "podman run -d --name {name} -p {port}:{port} --ip 10.88.0.1{} -v {name}:/data {IMAGE} \
                 echo {port}
             podman exec {name} sh -c 'echo of {name} | tee /kept >/data/kept'",
            // Both hosts give out the same ones.
            &port[2..]
        ))
        .await;
    }
}

async fn connect(clock: &Clock, lab: &Lab, host: &Node, container: Container) -> Workload {
    let (address, port) = (host.ip(), container.port);
    clock.step("c1", &format!("one connection to {address}:{port}"));
    let ask = [
        "client-echo",
        &address,
        port,
        "--every-ms",
        "20",
        "--grace-ms",
        "130000",
    ];
    lab.client(1).spawn(&ask).await
}

/// Whether each was finished, and nothing is left of any.
async fn recover(clock: &Clock, host: &Node, finished: &[bool]) {
    clock.step(host.name(), "livemig recover");
    let recovered = host.exec(&["livemig", "recover", "--json"]).await;
    let all = recovered.json();
    let all = all.as_array().map_or(&[][..], Vec::as_slice);
    let mut seen: Vec<bool> = all.iter().map(|one| one["finished"] == true).collect();
    seen.sort_unstable();
    let undone = seen.iter().filter(|finished| !**finished).count();
    clock.show(&format!(
        "{} finished, {undone} undone",
        seen.len() - undone
    ));
    assert_eq!(seen, finished, "{recovered}");
    for one in all {
        assert_eq!(one["leftovers"], json!([]), "{recovered}");
    }
}

/// Names and states, by name.
async fn containers(host: &Node) -> Vec<String> {
    let all = host
        .exec(&["podman", "ps", "--all", "--format", "{{.Names}} {{.State}}"])
        .await;
    let mut all: Vec<String> = all.stdout.lines().map(str::to_owned).collect();
    all.sort();
    all
}

async fn nothing_is_left(host: &Node) {
    let began = Instant::now();
    loop {
        let left = host.sh(LEFT).await;
        if left.text().is_empty() {
            return;
        }
        assert!(began.elapsed() < SETTLES, "on {}: {left}", host.name());
        tokio::time::sleep(LOOK * 10).await;
    }
}

/// How a migration ended.
fn ended(output: &Output) -> String {
    let last = output.stdout.lines().last().unwrap_or_default();
    let last: Value = serde_json::from_str(last).unwrap_or_default();
    format!("{}, {}", output.status, last["error"])
}
