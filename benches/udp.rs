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
//! the client, both hosts, the tunnel's two ends and the container share, and the kernel's counters
//! say where it was lost: as a rule in a socket's buffer (the default one, in the container), because
//! its process waited for a processor. What a rate loses in the
//! second although it loses nothing in the other two is the migration's doing, and must be nothing.
//! Each rate and mode has hosts of its own, freshly started.
//!
//! `LIVEMIG_BENCH_RATES` (1000,10000,50000,100000 datagrams per second), `LIVEMIG_BENCH_MODES`
//! (oneway,echo), `LIVEMIG_BENCH_SECONDS` (5, of each run; the migration is on top of that).

#[path = "../tests/lab/mod.rs"]
mod lab;
mod record;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use lab::pair::{self, Pair};
use record::number;
use serde_json::{Value, json};

const PORT: &str = "7000";
/// How long a migration may take.
const MOST: Duration = Duration::from_secs(40);
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
    let ip = h1.ip();
    let mut command = vec!["workload", "client-udp", &ip, PORT, "--rate", rate];
    command.extend(["--mode", mode, "--runs", "3"]);
    let client = c1.spawn_command(&command);
    // Only with the first answer in echo mode.
    client.wait_for("ready").await;
    let length = Duration::from_secs(seconds);
    // Each run is ended from here, so that the one with the migration has all of it.
    let end_of = async |run: &str| {
        client.signal(rustix::process::Signal::USR1);
        client.wait_for(run).await;
    };

    let before = Drops::read(&pair, 1).await;
    tokio::time::sleep(length).await;
    end_of("\"run\":0").await;
    let direct = Drops::read(&pair, 1).await;
    tokio::time::sleep(length / 2).await;
    let begin = Instant::now();
    let moving = pair.try_migrate("web", 1, 2, &[]);
    let moved = tokio::time::timeout(MOST, moving).await.ok();
    let took = begin.elapsed();
    tokio::time::sleep(length / 2).await;
    end_of("\"run\":1").await;
    let report = match &moved {
        Some(moved) if moved.status.success() => Some(pair::report(moved)),
        Some(moved) => {
            eprintln!("the container did not move:\n{}", moved.stderr);
            None
        }
        None => {
            eprintln!("the container had not moved after {MOST:?}");
            None
        }
    };
    let place = if report.is_some() { 2 } else { 1 };
    let moved = Drops::read(&pair, place).await;
    tokio::time::sleep(length).await;
    end_of("\"run\":2").await;
    let hop = Drops::read(&pair, place).await;
    let client = client.finish().await;
    assert!(client.status.success(), "{client}");
    pair.down().await;

    let mut rows: Vec<Value> = parse(&client.stdout);
    let of = [
        ("direct", direct.since(&before)),
        // The container's socket is a new one at the destination, its counters as well.
        ("direct, then hop", moved.since(&direct)),
        ("hop", hop.since(&moved)),
    ];
    for (run, (row, (path, drops))) in rows.iter_mut().zip(of).enumerate() {
        row["mode"] = json!(mode);
        row["path"] = json!(path);
        row["migrated"] = json!(run == 1);
        row["drops"] = drops.json();
        if run == 1 {
            row["total_ms"] = json!(took.as_secs_f64() * 1e3);
            row["moved"] = json!(report.is_some());
            if let Some(report) = &report {
                row["downtime_ms"] = report["downtime_ms"].clone();
                row["phases"] = report["phases"].clone();
                row["held"] = report["held"].clone();
            }
        }
    }
    rows
}

/// Where the kernel has thrown datagrams away, as far as it counts them.
#[derive(Debug, Clone)]
struct Drops(Vec<(&'static str, u64)>);

impl Drops {
    async fn read(pair: &Pair, place: usize) -> Drops {
        const ERRORS: &str = "awk '/^Udp:/ && $6 ~ /^[0-9]+$/ { print $6 }' /proc/net/snmp";
        // What waits for its turn in the kernel, on any processor; the second column of each.
        const BACKLOG: &str = "awk '{ print $2 }' /proc/net/softnet_stat";
        let (h1, h2, c1) = (pair.host(1), pair.host(2), pair.client(1));
        let inside =
            format!("nsenter -t $(podman inspect -f '{{{{.State.Pid}}}}' web) -n {ERRORS}");
        let queue = "cat /sys/class/net/livemig*/statistics/tx_dropped 2>/dev/null || true";
        let mut drops = Vec::new();
        for (name, node, script) in [
            ("container_socket", pair.host(place), inside.as_str()),
            ("client_socket", c1, ERRORS),
            ("h1_tunnel_socket", h1, ERRORS),
            ("h2_tunnel_socket", h2, ERRORS),
            ("h1_hop_queue", h1, queue),
            ("h2_hop_queue", h2, queue),
            ("backlog_of_the_machine", c1, BACKLOG),
        ] {
            let output = node.sh(script).await;
            let number = |text: &str| {
                let decimal = text.parse().ok();
                match name {
                    "backlog_of_the_machine" => u64::from_str_radix(text, 16).ok(),
                    _ => decimal,
                }
            };
            drops.push((name, output.stdout.lines().filter_map(number).sum()));
        }
        Drops(drops)
    }

    /// What was added since. A counter that is smaller now has begun anew.
    fn since(&self, before: &Drops) -> Drops {
        let both = self.0.iter().zip(&before.0);
        Drops(
            both.map(|((name, now), (_, then))| (*name, now.checked_sub(*then).unwrap_or(*now)))
                .collect(),
        )
    }

    fn json(&self) -> Value {
        let drops = self
            .0
            .iter()
            .map(|(name, count)| ((*name).to_owned(), json!(count)));
        Value::Object(drops.collect())
    }
}

/// The reports of the runs that have ended: a line for each.
fn parse(text: &str) -> Vec<Value> {
    text.lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect()
}

fn is_clean(row: &Value) -> bool {
    row["answered"] == true && row["moved"] != false && WRONGS.iter().all(|wrong| row[wrong] == 0)
}

fn line(row: &Value) -> String {
    let word = |key: &str| row[key].as_str().unwrap_or("?").to_owned();
    let note = if row["moved"] == false {
        "  did not move"
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

/// Where datagrams were thrown away, most first.
fn places(drops: &Value) -> String {
    let mut places: Vec<(u64, &str)> = drops
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(|(name, count)| {
            Some((count.as_u64().filter(|count| *count > 0)?, name.as_str()))
        })
        .collect();
    places.sort_unstable_by(|a, b| b.cmp(a));
    let words: Vec<String> = places
        .iter()
        .map(|(count, name)| format!("{count} {}", name.replace('_', " ")))
        .collect();
    match words.is_empty() {
        true => "the kernel has counted none of them".to_owned(),
        false => words.join(", "),
    }
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
            " (at {}/s {:.3} % is lost: {})",
            row["rate_pps"],
            100.0 * number(&row["lost"]) / number(&row["sent"]),
            places(&row["drops"])
        )
    });
    format!("{mode}, {path}, nothing migrating: {best} without loss{above}")
}
