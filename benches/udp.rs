//! `make bench-udp`: what becomes of small datagrams at a rate, while nothing happens and while the
//! container moves.
//!
//! A client sends numbered datagrams of 16 bytes at an exact rate, from one socket, to a container
//! that counts them (*oneway*) or sends them back (*echo*). Three runs follow each other on that
//! socket, each counted by itself:
//!
//! 1. on the direct path, nothing migrates;
//! 2. the container is moved in the middle of it;
//! 3. through the hop, nothing migrates.
//!
//! What the first and the third lose says what the path carries on this machine, whose processors
//! the client, both hosts, the tunnel's two ends and the container share. What a rate loses in the
//! second although it loses nothing in the other two is the migration's doing, and must be nothing.
//! Each rate and mode has hosts of its own, freshly started.
//!
//! `LIVEMIG_BENCH_RATES` (1000,10000,50000,100000 datagrams per second), `LIVEMIG_BENCH_MODES`
//! (oneway,echo), `LIVEMIG_BENCH_SECONDS` (5, of each run).

#[path = "../tests/lab/mod.rs"]
mod lab;
mod record;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use lab::Process;
use lab::pair::{self, Pair};
use record::number;
use serde_json::{Value, json};

const PORT: &str = "7000";
/// A migration's preparations take about as long before the container's packets begin to wait.
const LEAD: Duration = Duration::from_millis(500);
/// What goes wrong with a datagram.
const WRONGS: [&str; 3] = ["lost", "duplicated", "reordered"];

#[tokio::main]
async fn main() -> ExitCode {
    if !record::wanted() {
        return ExitCode::SUCCESS;
    }
    let seconds: u64 = record::setting("LIVEMIG_BENCH_SECONDS", 5);
    let rates = record::choice("LIVEMIG_BENCH_RATES", "1000,10000,50000,100000");
    let modes = record::choice("LIVEMIG_BENCH_MODES", "oneway,echo");

    println!(
        "{:>8} {:<7} {:<7} {:<9} {:>8} {:>7} {:>6} {:>9} {:>10} {:>11}",
        "rate/s",
        "mode",
        "path",
        "migrated",
        "sent",
        "lost",
        "twice",
        "reordered",
        "gap/ms",
        "downtime/ms"
    );
    let mut rows = Vec::new();
    for rate in &rates {
        for mode in &modes {
            for row in measure(rate, mode, seconds).await {
                println!("{}", line(&row));
                rows.push(row);
            }
        }
    }
    println!();
    for mode in &modes {
        for path in ["direct", "hop"] {
            println!("{}", carried(&rows, mode, path));
        }
    }
    record::write_json("udp.json", &json!(rows));

    let mut passed = true;
    for row in rows.iter().filter(|row| row["migrated"] == true) {
        let same = |other: &&Value| {
            other["rate_pps"] == row["rate_pps"]
                && other["mode"] == row["mode"]
                && other["migrated"] == false
        };
        // Only what the same path carries without loss can be asked of it while it moves.
        if rows.iter().filter(same).all(is_clean) && !is_clean(row) {
            println!("FAIL: because of the migration: {}", line(row));
            passed = false;
        }
    }
    if passed {
        println!("PASS: nothing was lost, duplicated or reordered because of a migration");
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Three runs of one rate, a row for each.
async fn measure(rate: &str, mode: &str, seconds: u64) -> Vec<Value> {
    let pair = Pair::up().await;
    let (h1, c1) = (pair.host(1), pair.client(1));
    let server = match mode {
        "oneway" => "udp-count",
        "echo" => "udp-echo",
        other => panic!("no such mode: {other}"),
    };
    h1.run_workload("web", &["-p", "7000:7000/udp"], &[server, PORT])
        .await;
    let client = c1.spawn_command(&[
        "workload",
        "client-udp",
        &h1.ip(),
        PORT,
        "--rate",
        rate,
        "--mode",
        mode,
        "--runs",
        "3",
        "--seconds",
        &seconds.to_string(),
    ]);
    client.wait_for("\"run\":0").await;
    let half = Duration::from_secs(seconds) / 2;
    tokio::time::sleep(half.saturating_sub(LEAD)).await;
    let begin = Instant::now();
    let moved = pair.try_migrate("web", 1, 2, &[]).await;
    let took = begin.elapsed();
    // Else part of the migration was not measured.
    let within = runs(&client).len() == 1;
    let client = client.finish().await;
    assert!(client.status.success(), "{client}");
    let report = moved.status.success().then(|| pair::report(&moved));
    if report.is_none() {
        eprintln!("the container did not move:\n{}", moved.stderr);
    }
    let mut rows: Vec<Value> = parse(&client.stdout);
    for (row, (path, migrated)) in
        rows.iter_mut()
            .zip([("direct", false), ("direct", true), ("hop", false)])
    {
        row["mode"] = json!(mode);
        row["path"] = json!(path);
        row["migrated"] = json!(migrated);
        if migrated {
            row["path"] = json!("direct, then hop");
            row["within"] = json!(within);
            row["total_ms"] = json!(took.as_secs_f64() * 1e3);
            row["moved"] = json!(report.is_some());
            if let Some(report) = &report {
                row["downtime_ms"] = report["downtime_ms"].clone();
                row["phases"] = report["phases"].clone();
                row["held"] = report["held"].clone();
            }
        }
    }
    pair.down().await;
    rows
}

fn runs(client: &Process) -> Vec<Value> {
    parse(&client.stdout())
}

/// The reports of the runs that have ended: a line for each.
fn parse(text: &str) -> Vec<Value> {
    text.lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect()
}

fn is_clean(row: &Value) -> bool {
    row["answered"] == true
        && row["moved"] != false
        && row["within"] != false
        && WRONGS.iter().all(|wrong| row[wrong] == 0)
}

fn line(row: &Value) -> String {
    let word = |key: &str| row[key].as_str().unwrap_or("?").to_owned();
    let note = if row["moved"] == false {
        "  did not move"
    } else if row["within"] == false {
        "  longer than the run"
    } else if row["answered"] == false {
        "  the counts were not to be had"
    } else {
        ""
    };
    format!(
        "{:>8} {:<7} {:<7} {:<9} {:>8} {:>7} {:>6} {:>9} {:>10.1} {:>11}{note}",
        row["rate_pps"].to_string(),
        word("mode"),
        word("path").split(',').next().unwrap_or_default(),
        if row["migrated"] == true { "yes" } else { "no" },
        row["sent"].to_string(),
        row["lost"].to_string(),
        row["duplicated"].to_string(),
        row["reordered"].to_string(),
        number(&row["longest_gap_ms"]),
        row["downtime_ms"]
            .as_f64()
            .map_or(String::new(), |downtime| format!("{downtime:.1}")),
    )
}

/// Up to which rate a path carries everything while nothing migrates.
fn carried(rows: &[Value], mode: &str, path: &str) -> String {
    let mut best = None;
    let mut above = None;
    for row in rows {
        if row["mode"] == mode && row["path"] == path && row["migrated"] == false {
            if above.is_none() && is_clean(row) {
                best = Some(row);
            } else {
                above = above.or(Some(row));
            }
        }
    }
    let path = match path {
        "hop" => "through a hop",
        _ => "directly",
    };
    let best = best.map_or("no rate".to_owned(), |row| format!("{}/s", row["rate_pps"]));
    let above = above.map_or(String::new(), |row| {
        format!(
            " (at {}/s {:.3} % is lost)",
            row["rate_pps"],
            100.0 * number(&row["lost"]) / number(&row["sent"])
        )
    });
    format!("{mode}, {path}, nothing migrating: {best} without loss{above}")
}
