//! `make bench`: how long a client waits while a container moves, and how long the move takes.
//!
//! Two ways, in turns (naive, rest, naive, rest, ...), so that whatever else the machine does hits
//! both. Each run has hosts of its own, freshly started, a fresh container and one fresh connection
//! with a request every 2 ms. A run in which that connection does not survive fails the bench.
//!
//! - *naive*: `benches/naive/*.sh`, what a careful operator does with Podman's command, nftables,
//!   conntrack-tools and routes: drop what comes in, checkpoint, copy, restore, route, let it in again.
//!   The copy is `cat` into a TCP connection (bash's `/dev/tcp`) and busybox's `nc` at the other end;
//!   flows are listed while the checkpoint runs; the way between the hosts is a plain route. No SSH,
//!   no tunnel, no polling: each could only be slower.
//! - *rest*: `livemig migrate`, which also sets up its tunnel, for none is there.
//!
//! Both have CRIU's configuration of the lab, and the image at both ends. The total is the wall clock
//! around the one command at the source, started alike. `LIVEMIG_BENCH_RUNS` (10) of each;
//! `LIVEMIG_BENCH_ENGINES` (naive,rest) for one alone. The result is in `target/bench/downtime.json`.

#[path = "../tests/lab/mod.rs"]
mod lab;
mod record;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use lab::{Lab, Output, Process};
use record::{Figures, number};
use serde_json::{Value, json};

const WORKLOAD: &str = "echo";
/// The client's longest gap with livemig may be this part of the naive one's.
const RATIO: f64 = 0.6;
const SOURCE: &str = include_str!("naive/source.sh");
const DESTINATION: &str = include_str!("naive/destination.sh");

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Engine {
    Naive,
    Rest,
}

impl Engine {
    fn name(self) -> &'static str {
        match self {
            Engine::Naive => "naive",
            Engine::Rest => "rest",
        }
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    if !record::wanted() {
        return ExitCode::SUCCESS;
    }
    let count: usize = record::setting("LIVEMIG_BENCH_RUNS", 10);
    let asked = record::choice("LIVEMIG_BENCH_ENGINES", "naive,rest");
    let engines: Vec<Engine> = [Engine::Naive, Engine::Rest]
        .into_iter()
        .filter(|engine| asked.iter().any(|name| name == engine.name()))
        .collect();

    let mut results: Vec<(Engine, Vec<Value>)> =
        engines.iter().map(|engine| (*engine, Vec::new())).collect();
    for round in 1..=count {
        for (engine, runs) in &mut results {
            let run = run(*engine).await;
            eprintln!(
                "{round:>3} of {count}  {:<6} gap {:>7.1} ms  total {:>7.1} ms{}",
                engine.name(),
                number(&run["gap_ms"]),
                number(&run["total_ms"]),
                if run["survived"] == true {
                    ""
                } else {
                    "  the connection did NOT survive"
                }
            );
            runs.push(run);
        }
    }

    println!(
        "\n{:<9} {:<6} {:>3}  {:<28} {:<28} {:>10}",
        "workload",
        "engine",
        "n",
        "gap/ms: median [min max]",
        "total/ms: median [min max]",
        "bytes sent"
    );
    let mut survived = true;
    let mut gaps = Vec::new();
    let mut items = Vec::new();
    for (engine, runs) in &results {
        let gap = Figures::of(runs, "gap_ms");
        let total = Figures::of(runs, "total_ms");
        let bytes = Figures::of(runs, "bytes_sent").median;
        println!(
            "{WORKLOAD:<9} {:<6} {:>3}  {gap:<28} {total:<28} {bytes:>10.0}",
            engine.name(),
            runs.len(),
        );
        survived &= runs.iter().all(|run| run["survived"] == true);
        gaps.push(gap.median);
        items.push(json!({
            "workload": WORKLOAD,
            "engine": engine.name(),
            "n": runs.len(),
            "gap_ms": gap.json(),
            "total_ms": total.json(),
            "bytes_sent": bytes,
            "runs": runs,
        }));
    }
    floor(&results);
    println!();
    record::write_json("downtime.json", &json!(items));

    let mut passed = survived;
    if !survived {
        println!("FAIL: not every connection survived");
    }
    if let [naive, rest] = gaps[..] {
        let ratio = rest / naive;
        let good = ratio <= RATIO;
        println!(
            "{}: the gap is {ratio:.2} of the naive one's ({RATIO} or less is asked for)",
            if good { "PASS" } else { "FAIL" }
        );
        passed &= good;
    }
    if passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// One migration, with hosts of its own.
async fn run(engine: Engine) -> Value {
    let lab = Lab::new(2).await;
    let (h1, h2, c1) = (lab.host(1), lab.host(2), lab.client(1));
    // Also where it has nothing to do: whatever it costs, it costs both.
    let _agent = join(&lab).await;
    h1.run_workload("web", &["-p", "7000:7000"], &["echo", "7000"])
        .await;
    let client = c1
        .spawn(&["client-echo", &h1.ip(), "7000", "--every-ms", "2"])
        .await;
    tokio::time::sleep(Duration::from_millis(500)).await;

    let (total, mut run) = match engine {
        Engine::Naive => naive(&lab).await,
        Engine::Rest => rest(&lab).await,
    };
    // The connection is to be seen going on; requests that wait are answered before the client ends.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let seen = client.stop().await;
    let moved = h2.container_state("web").await.as_deref() == Some("running")
        && h1.container_state("web").await.is_none();
    run["gap_ms"] = seen["longest_gap_ms"].clone();
    run["total_ms"] = json!(total.as_secs_f64() * 1e3);
    run["moved"] = json!(moved);
    run["survived"] = json!(
        moved
            && seen["same_socket"] == true
            && seen["resets"] == 0
            && seen["unanswered"] == 0
            && seen["wrong"] == 0
            && seen["replies"].as_u64() > Some(0)
    );
    run["client"] = seen;
    lab.down().await;
    run
}

/// The destination's agent, with the source let in. It ends when it is dropped.
async fn join(lab: &Lab) -> Process {
    let (source, destination) = (lab.host(1), lab.host(2));
    let agent = destination.spawn_command(&["livemig", "agent"]);
    agent.wait_for("listening on").await;
    let token = destination
        .exec(&["livemig", "invite", "--address", &destination.ip()])
        .await;
    source
        .exec(&["livemig", "join", token.text(), "--name", "h2"])
        .await;
    agent
}

async fn naive(lab: &Lab) -> (Duration, Value) {
    let (source, destination) = (lab.host(1), lab.host(2));
    let format = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
    let address = source
        .exec(&["podman", "inspect", "--format", format, "web"])
        .await;
    let address = address.text();
    let receiving =
        destination.spawn_command(&["bash", "-c", DESTINATION, "naive", address, &source.ip()]);
    receiving.wait_for("ready").await;

    let begin = Instant::now();
    let sent = source
        .try_exec(&[
            "bash",
            "-c",
            SOURCE,
            "naive",
            "web",
            address,
            &destination.ip(),
        ])
        .await;
    let took = begin.elapsed();
    succeeded(&sent);
    let received = receiving.finish().await;
    succeeded(&received);
    let (sent, received) = (sent.json(), received.json());
    let micros = |value: &Value| json!(number(value) / 1e3);
    // `--print-stats` gives a list: one container each.
    let checkpoint = &sent["checkpoint"]["container_statistics"][0];
    let restore = &received["restore"]["container_statistics"][0];
    let run = json!({
        "bytes_sent": sent["bytes_sent"],
        "flows": received["flows"],
        "podman_checkpoint_ms": micros(&sent["checkpoint"]["podman_checkpoint_duration"]),
        "runtime_checkpoint_ms": micros(&checkpoint["runtime_checkpoint_duration"]),
        "criu_frozen_ms": micros(&checkpoint["criu_statistics"]["frozen_time"]),
        "podman_restore_ms": micros(&received["restore"]["podman_restore_duration"]),
        "runtime_restore_ms": micros(&restore["runtime_restore_duration"]),
        "criu_restore_ms": micros(&restore["criu_statistics"]["restore_time"]),
    });
    (took, run)
}

async fn rest(lab: &Lab) -> (Duration, Value) {
    let source = lab.host(1);
    let begin = Instant::now();
    let migrated = source
        .try_exec(&["livemig", "--json", "migrate", "web", "--to", "h2"])
        .await;
    let took = begin.elapsed();
    succeeded(&migrated);
    let last = migrated.stdout.lines().last().unwrap_or_default();
    let last: Value = serde_json::from_str(last).expect("the last line is the report");
    let report = &last["report"];
    let run = json!({
        "bytes_sent": report["bytes_sent"],
        "flows": report["flows"].as_array().map(Vec::len),
        "downtime_ms": report["downtime_ms"],
        "phases": report["phases"],
        "dump": report["dump"],
    });
    (took, run)
}

fn succeeded(output: &Output) {
    assert!(output.status.success(), "{output}");
}

/// What no engine that has Podman call runc and CRIU gets below, from the statistics of the naive runs.
fn floor(results: &[(Engine, Vec<Value>)]) {
    let Some((_, naive)) = results.iter().find(|(engine, _)| *engine == Engine::Naive) else {
        return;
    };
    let of = |key| Figures::of(naive, key);
    println!(
        "\nthe floor: runc and CRIU take {} ms to checkpoint and {} ms to restore, \
         of which CRIU's frozen time is {} ms and its restore {} ms",
        of("runtime_checkpoint_ms"),
        of("runtime_restore_ms"),
        of("criu_frozen_ms"),
        of("criu_restore_ms"),
    );
}
