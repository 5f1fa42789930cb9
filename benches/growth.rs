//! `make bench-growth`: how long a client waits, and how long the move takes, against how much memory the
//! container has.
//!
//! As in `make bench-downtime` (`downtime/run.rs`), with other sizes: each run has hosts of its own and
//! one fresh connection, and the container is asked for every page of its memory afterwards. Each size
//! idle, and for livemig's engines also with a tenth of the memory rewritten per second.
//!
//! | variable | default | |
//! | --- | --- | --- |
//! | `LIVEMIG_BENCH_RUNS` | 3 | of each |
//! | `LIVEMIG_BENCH_SIZES` | `64,128,256,512,1024,2048,4096` | MiB |
//! | `LIVEMIG_BENCH_ENGINES` | all that this livemig has, without `naive` | |
//!
//! The result is in `target/bench/growth.json` and, as a picture, `growth.svg`.

// What the bench of the downtime has, and this one does not need.
#![allow(dead_code)]

#[path = "downtime/engine.rs"]
mod engine;
#[path = "../tests/lab/mod.rs"]
mod lab;
#[path = "downtime/memory.rs"]
mod memory;
mod record;
#[path = "downtime/run.rs"]
mod run;
#[path = "downtime/workload.rs"]
mod workload;

use std::process::ExitCode;

use engine::{Engine, Known};
use record::Figures;
use record::svg::{Anchor, Drawing, Stroke};
use serde_json::{Value, json};
use workload::Workload;

/// Podman has an archive of the memory twice over on either host, which in the lab is memory too: 4 GiB
/// would take more than most machines have. In MiB.
const MOST_BY_ARCHIVE: u64 = 2048;

/// All runs of one size with one engine.
#[derive(Debug)]
struct Point {
    workload: Workload,
    engine: Engine,
    runs: Vec<Value>,
}

impl Point {
    fn of(&self, key: &str) -> Figures {
        Figures::of(&self.runs, key)
    }

    fn json(&self) -> Value {
        json!({
            "workload": self.workload.to_string(),
            "mib": self.workload.mib,
            "dirty_percent": self.workload.percent,
            "engine": self.engine.name(),
            "n": self.runs.len(),
            "gap_ms": self.of("gap_ms").json(),
            "total_ms": self.of("total_ms").json(),
            "bytes_sent": self.of("bytes_sent").median,
            "survived": self.survived(),
        })
    }

    fn survived(&self) -> bool {
        self.runs.iter().all(|run| run["survived"] == true)
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    if !record::wanted() {
        return ExitCode::SUCCESS;
    }
    let runs: usize = record::setting("LIVEMIG_BENCH_RUNS", 3);
    let known = Known::ask().await;
    let mut points = points(known);
    for round in 1..=runs {
        for point in &mut points {
            let run = run::measure(known, point.workload, point.engine).await;
            let (workload, engine) = (point.workload, point.engine);
            eprintln!(
                "{round:>3}  {workload:<12} {engine:<8} gap {} ms, total {} ms, survived: {}",
                run["gap_ms"], run["total_ms"], run["survived"]
            );
            point.runs.push(run);
        }
    }
    table(&points);
    let items: Vec<Value> = points.iter().map(Point::json).collect();
    record::write_json("growth.json", &json!(items));
    record::write("growth.svg", &chart(&points));
    if points.iter().all(Point::survived) {
        ExitCode::SUCCESS
    } else {
        println!("FAIL: not every connection went on with every page in its place");
        ExitCode::FAILURE
    }
}

fn points(known: Known) -> Vec<Point> {
    let sizes = record::choice("LIVEMIG_BENCH_SIZES", "64,128,256,512,1024,2048,4096");
    let engines = Engine::ALL.into_iter().filter(|engine| known.has(*engine));
    let engines = engines.filter(|engine| *engine != Engine::Naive);
    let names: Vec<&str> = engines.clone().map(Engine::name).collect();
    let asked = record::choice("LIVEMIG_BENCH_ENGINES", &names.join(","));
    let mut points = Vec::new();
    for size in &sizes {
        let mib = size.parse();
        let mib = mib.unwrap_or_else(|_| panic!("LIVEMIG_BENCH_SIZES: not a number: {size}"));
        for engine in engines.clone() {
            if !asked.iter().any(|name| name == engine.name()) {
                continue;
            }
            if engine == Engine::Rest && mib > MOST_BY_ARCHIVE {
                println!(
                    "{mib} MiB with {engine}: left out, its archives would not fit into memory"
                );
                continue;
            }
            for percent in [0, 10] {
                // Nothing of the floor's goes on while it is measured.
                if percent == 0 || engine != Engine::Floor {
                    points.push(Point {
                        workload: Workload { mib, percent },
                        engine,
                        runs: Vec::new(),
                    });
                }
            }
        }
    }
    points
}

fn table(points: &[Point]) {
    println!(
        "\n{:<13} {:<8} {:>2}  {:<27} {:<27} {:>9}",
        "workload", "engine", "n", "gap/ms: median [min max]", "total/ms", "MiB sent"
    );
    for point in points {
        println!(
            "{:<13} {:<8} {:>2}  {:<27} {:<27} {:>9.1}",
            point.workload,
            point.engine,
            point.runs.len(),
            point.of("gap_ms"),
            point.of("total_ms"),
            point.of("bytes_sent").median / f64::from(1 << 20),
        );
    }
    println!();
}

/// Two panels, the gap and the whole move, both axes by powers; a line for each engine, of dashes where
/// the memory is rewritten.
fn chart(points: &[Point]) -> String {
    const WIDTH: f64 = 400.0;
    const HEIGHT: f64 = 300.0;
    const LEFT: f64 = 70.0;
    const TOP: f64 = 50.0;
    const APART: f64 = 490.0;
    let bottom = TOP + HEIGHT;
    let mut drawing = Drawing::new(1000.0, 460.0);
    let sizes = points
        .iter()
        .map(|point| (point.workload.mib as f64).log2());
    let (least, most) = ends(sizes);
    for (panel, (key, title)) in [
        ("gap_ms", "longest gap a client saw, ms"),
        ("total_ms", "the whole move, ms"),
    ]
    .into_iter()
    .enumerate()
    {
        let left = LEFT + panel as f64 * APART;
        let values = points.iter().map(|point| point.of(key).median.log10());
        let (low, high) = ends(values);
        let (low, high) = (low.floor(), high.ceil());
        let x = |mib: u64| left + WIDTH * ((mib as f64).log2() - least) / (most - least).max(1.0);
        let y = |ms: f64| bottom - HEIGHT * (ms.log10() - low) / (high - low).max(1.0);
        drawing.heading((left, TOP - 14.0), title);
        for power in low as i32..=high as i32 {
            let value = 10f64.powi(power);
            drawing.line((left, y(value)), (left + WIDTH, y(value)), Stroke::GRID);
            let label = format!("{value}");
            drawing.text((left - 8.0, y(value) + 4.0), Anchor::Left, &label);
        }
        let mut sizes: Vec<u64> = points.iter().map(|point| point.workload.mib).collect();
        sizes.sort_unstable();
        sizes.dedup();
        for mib in sizes {
            let label = Workload { mib, percent: 0 }.to_string();
            drawing.text((x(mib), bottom + 18.0), Anchor::Middle, &label);
        }
        for (engine, colour) in COLOURS {
            for percent in [0, 10] {
                let of = points
                    .iter()
                    .filter(|point| point.engine == engine && point.workload.percent == percent);
                let stroke = stroke(colour, percent);
                let line = of.map(|point| (x(point.workload.mib), y(point.of(key).median)));
                drawing.path(line, stroke);
            }
        }
    }
    let mut at = (LEFT, bottom + 50.0);
    for (engine, colour) in COLOURS {
        for percent in [0, 10] {
            let is = |point: &&Point| point.engine == engine && point.workload.percent == percent;
            if points.iter().any(|point| is(&point)) {
                let how = if percent == 0 {
                    "idle"
                } else {
                    "10 % a second"
                };
                drawing.key(at, stroke(colour, percent), &format!("{engine}, {how}"));
                at.0 += 230.0;
                if at.0 > 800.0 {
                    at = (LEFT, at.1 + 22.0);
                }
            }
        }
    }
    drawing.finish()
}

const COLOURS: [(Engine, &str); 4] = [
    (Engine::Rest, "#c4531a"),
    (Engine::Direct, "#0b62a4"),
    (Engine::Postcopy, "#2c8a3d"),
    (Engine::Floor, "#777777"),
];

fn stroke(colour: &'static str, percent: u64) -> Stroke {
    let stroke = Stroke::new(colour, 2.0);
    if percent == 0 {
        stroke
    } else {
        stroke.dashed()
    }
}

/// The least and the greatest of what are numbers.
fn ends(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if values.is_empty() {
        (0.0, 1.0)
    } else {
        (least, most)
    }
}
