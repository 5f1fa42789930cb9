//! No datagram is lost, doubled or overtaken because its container moves.

mod lab;

use std::time::Duration;

use lab::pair::{self, Pair};
use serde_json::Value;

const PORT: &str = "7000";
/// Datagrams a second: what two processors carry easily that also have to restore a container.
const RATE: &str = "2000";
/// How long each run takes, in seconds: longer than a migration.
const SECONDS: &str = "6";

/// What became of the datagrams while nothing moved, while the container moved, and afterwards; and
/// the report of the migration.
async fn measure(server: &str, mode: &str) -> (Vec<Value>, Value) {
    let pair = Pair::up().await;
    let (h1, c1) = (pair.host(1), pair.client(1));
    h1.run_workload("web", &["-p", "7000:7000/udp"], &[server, PORT])
        .await;
    let ip = h1.ip();
    let client = c1.spawn_command(&[
        "workload",
        "client-udp",
        &ip,
        PORT,
        "--rate",
        RATE,
        "--mode",
        mode,
        "--runs",
        "3",
        "--seconds",
        SECONDS,
    ]);
    client.wait_for("\"run\":0").await;
    // Not at the beginning of the run: there have to be flows to move.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let moved = pair.try_migrate("web", 1, 2, &[]).await;
    assert!(moved.status.success(), "{moved}");
    let report = pair::report(&moved);
    pair.assert_moved("web", 1, 2, &report).await;
    let runs = |text: &str| -> Vec<Value> {
        text.lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()
    };
    let ended = runs(&client.stdout()).len();
    let client = client.finish().await;
    assert!(client.status.success(), "{client}");
    let runs = runs(&client.stdout);
    assert_eq!(runs.len(), 3, "{client}");
    assert_eq!(ended, 1, "the migration took longer than the run: {client}");
    println!(
        "{mode}: held {}, drained {}",
        report["held"], report["drain"]
    );
    pair.down().await;
    (runs, report)
}

fn assert_nothing_went_wrong(runs: &[Value], report: &Value) {
    // What the path loses by itself would not be the migration's.
    for (run, what) in runs.iter().zip(["before", "during", "after"]) {
        println!("{what}: {run}");
    }
    for (run, what) in runs.iter().zip(["before", "during", "after"]) {
        assert_eq!(run["answered"], true, "{what}: {run}");
        for wrong in ["lost", "duplicated", "reordered"] {
            assert_eq!(run[wrong], 0, "{wrong} {what}: {run}, {report}");
        }
    }
    let number = |name: &str| report["held"][name].as_u64().expect("a number");
    // It was a move under traffic, and everything that waited went on.
    assert!(number("held") > 100, "{report}");
    assert_eq!(number("held"), number("released"), "{report}");
    assert_eq!(number("dropped_by_bound"), 0, "{report}");
    assert!(number("peak_bytes") > 4400, "{report}");
    assert_eq!(report["drain"]["left"], serde_json::json!([]), "{report}");
}

#[tokio::test]
async fn a_stream_of_datagrams_arrives_whole_and_in_order() {
    let (runs, report) = measure("udp-count", "oneway").await;
    assert_nothing_went_wrong(&runs, &report);
}

#[tokio::test]
async fn every_datagram_is_answered_once_and_in_order() {
    let (runs, report) = measure("udp-echo", "echo").await;
    assert_nothing_went_wrong(&runs, &report);
}
