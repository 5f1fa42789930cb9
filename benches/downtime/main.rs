//! `make bench-downtime`: how long a client waits while a container moves, how long the move takes, and
//! what it costs.
//!
//! Workloads (`workload.rs`) × engines (`engine.rs`), in turns: each round has one run of each, so that
//! whatever else the machine does hits all of them. Each run has hosts of its own, freshly started, a
//! fresh container, and one fresh connection with a request every 1 ms. A run in which the connection
//! does not go on, or a page of the container's memory is lost or old, fails the bench.
//!
//! - *gap*: the longest time in which the client heard nothing.
//! - *frozen*: for how long the container did not run. The naive one's is from its command for the
//!   checkpoint to the destination's word that the restore is done.
//! - *total*: the wall clock around the one command at the source.
//! - *extra*: what the hosts' memory holds more than before, the container aside, at its peak
//!   (`memory.rs`); the worst of all runs.
//!
//! | variable | default | |
//! | --- | --- | --- |
//! | `LIVEMIG_BENCH_RUNS` | 15 | runs of each pair |
//! | `LIVEMIG_BENCH_SHARE` | none | for a quick look: seconds after which a pair other than with `echo` ends sooner, but not before its third run |
//! | `LIVEMIG_BENCH_ENGINES` | all that this livemig has | `naive,rest,direct,postcopy,floor` |
//! | `LIVEMIG_BENCH_WORKLOADS` | all | `echo,64MiB,512MiB,2GiB,64MiB-dirty,...` |
//!
//! The result is in `target/bench/downtime.json`, and the parts of each downtime, as the reports have
//! them, in the picture `breakdown.svg`.

mod breakdown;
mod engine;
#[path = "../../tests/lab/mod.rs"]
mod lab;
mod memory;
#[path = "../record/mod.rs"]
mod record;
mod run;
mod verdict;
mod workload;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use engine::{Engine, Known};
use record::{Figures, number};
use serde_json::{Value, json};
use workload::Workload;

/// No pair of workload and engine has less runs than this, whatever its share of the time.
const LEAST: usize = 3;

/// A workload and an engine, with all their runs.
#[derive(Debug)]
struct Pair {
    workload: Workload,
    engine: Engine,
    runs: Vec<Value>,
    spent: Duration,
}

impl Pair {
    /// Whether one more run would be more than its share of the time.
    fn is_done(&self, share: Duration) -> bool {
        let runs = self.runs.len();
        self.workload != Workload::ECHO && runs >= LEAST && self.spent > share
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    if !record::wanted() {
        return ExitCode::SUCCESS;
    }
    let rounds: usize = record::setting("LIVEMIG_BENCH_RUNS", 15);
    let share = Duration::from_secs(record::setting("LIVEMIG_BENCH_SHARE", u64::MAX));
    let known = Known::ask().await;
    let mut pairs = pairs(known);

    for round in 1..=rounds {
        for pair in pairs.iter_mut().filter(|pair| !pair.is_done(share)) {
            let begin = Instant::now();
            let run = run::measure(known, pair.workload, pair.engine).await;
            pair.spent += begin.elapsed();
            show(round, pair, &run);
            pair.runs.push(run);
        }
    }

    table(&pairs);
    let items: Vec<Value> = pairs.iter().map(summary).collect();
    record::write_json("downtime.json", &json!(items));
    if let Some(picture) = breakdown::chart(&pairs) {
        record::write("breakdown.svg", &picture);
    }
    if verdict::passed(&pairs) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// What is asked for, in the order of a round.
fn pairs(known: Known) -> Vec<Pair> {
    let workloads: Vec<String> = Workload::all().iter().map(ToString::to_string).collect();
    let workloads = record::choice("LIVEMIG_BENCH_WORKLOADS", &workloads.join(","));
    let engines = Engine::ALL.into_iter().filter(|engine| known.has(*engine));
    let engines: Vec<&str> = engines.map(Engine::name).collect();
    let engines = record::choice("LIVEMIG_BENCH_ENGINES", &engines.join(","));
    let is_in = |list: &[String], name: &str| list.iter().any(|asked| asked == name);
    let mut pairs = Vec::new();
    for workload in Workload::all() {
        for engine in Engine::ALL {
            if is_in(&workloads, &workload.to_string()) && is_in(&engines, engine.name()) {
                pairs.push(Pair {
                    workload,
                    engine,
                    runs: Vec::new(),
                    spent: Duration::ZERO,
                });
            }
        }
    }
    pairs
}

fn show(round: usize, pair: &Pair, run: &Value) {
    let extra = &run["peak_extra_mib"];
    eprintln!(
        "{round:>3}  {:<12} {:<8} gap {:>7} ms  frozen {:>7} ms  total {:>7} ms  extra {:>4} and {:>4} MiB{}",
        pair.workload,
        pair.engine,
        tenths(number(&run["gap_ms"])),
        tenths(number(&run["frozen_ms"])),
        tenths(number(&run["total_ms"])),
        whole(number(&extra["source"])),
        whole(number(&extra["destination"])),
        if run["survived"] == true {
            ""
        } else {
            "  it did NOT survive"
        }
    );
}

fn table(pairs: &[Pair]) {
    println!(
        "\n{:<12} {:<8} {:>2}  {:<27} {:<27} {:>9}  {:>9}  extra MiB: source, destination",
        "workload", "engine", "n", "gap/ms: median [min max]", "total/ms", "frozen/ms", "MiB sent",
    );
    for pair in pairs {
        let of = |key| Figures::of(&pair.runs, key);
        println!(
            "{:<12} {:<8} {:>2}  {:<27} {:<27} {:>9}  {:>9}  {}, {}",
            pair.workload,
            pair.engine,
            pair.runs.len(),
            of("gap_ms"),
            of("total_ms"),
            tenths(of("frozen_ms").median),
            tenths(of("bytes_sent").median / f64::from(1 << 20)),
            whole(peak(&pair.runs, "source")),
            whole(peak(&pair.runs, "destination")),
        );
    }
    println!();
}

/// A figure, or a dash where there is none.
fn tenths(value: f64) -> String {
    decimals(value, 1)
}

fn whole(value: f64) -> String {
    decimals(value, 0)
}

fn decimals(value: f64, count: usize) -> String {
    if value.is_nan() {
        "-".into()
    } else {
        format!("{value:.count$}")
    }
}

/// The worst of all runs, at one end.
fn peak(runs: &[Value], end: &str) -> f64 {
    let of_run = |run: &Value| number(&run["peak_extra_mib"][end]);
    Figures::from(runs.iter().map(of_run).collect::<Vec<_>>()).max
}

fn summary(pair: &Pair) -> Value {
    let of = |key| Figures::of(&pair.runs, key);
    json!({
        "workload": pair.workload.to_string(),
        "engine": pair.engine.name(),
        "n": pair.runs.len(),
        "gap_ms": of("gap_ms").json(),
        "total_ms": of("total_ms").json(),
        "frozen_ms": of("frozen_ms").json(),
        "bytes_sent": of("bytes_sent").median,
        "peak_extra_mib": {
            "source": peak(&pair.runs, "source"),
            "destination": peak(&pair.runs, "destination"),
        },
        "runs": pair.runs,
    })
}
