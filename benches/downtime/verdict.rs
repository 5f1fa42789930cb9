//! What is asked of the figures.

use crate::Pair;
use crate::engine::Engine;
use crate::record::{Figures, number};
use crate::workload::Workload;

const ECHO: Workload = Workload::ECHO;
const HALF_GIB: Workload = Workload {
    mib: 512,
    percent: 0,
};

/// Prints each demand, with what became of it. Returns whether all are met for which there are figures.
pub fn passed(pairs: &[Pair]) -> bool {
    let gap = |workload: Workload, engine: Engine| {
        let pair = pairs
            .iter()
            .find(|pair| pair.workload == workload && pair.engine == engine)?;
        Some(Figures::of(&pair.runs, "gap_ms"))
    };
    let median = |workload, engine| gap(workload, engine).map(|gap| gap.median);
    let mut passed = true;
    let mut ratio = |what: &str, above: Option<f64>, below: Option<f64>, most: f64| {
        let (Some(above), Some(below)) = (above, below) else {
            println!("not measured: {what}");
            return;
        };
        let ratio = above / below;
        let good = ratio <= most;
        println!(
            "{}: {what}: {ratio:.2} ({above:.1} ms to {below:.1} ms; {most} or less is asked for)",
            if good { "PASS" } else { "FAIL" }
        );
        passed &= good;
    };
    let direct = median(ECHO, Engine::Direct);
    let naive = median(ECHO, Engine::Naive);
    ratio(
        "echo, gap of rest to naive",
        median(ECHO, Engine::Rest),
        naive,
        0.6,
    );
    ratio("echo, gap of direct to naive", direct, naive, 0.15);
    ratio(
        "echo, gap of direct to the floor",
        direct,
        median(ECHO, Engine::Floor),
        1.6,
    );
    ratio(
        "echo, worst gap of direct to its median",
        gap(ECHO, Engine::Direct).map(|gap| gap.max),
        direct,
        2.0,
    );
    ratio(
        "512MiB, gap of direct to the floor",
        median(HALF_GIB, Engine::Direct),
        median(HALF_GIB, Engine::Floor),
        1.6,
    );
    ratio(
        "gap of postcopy with 512MiB to direct with echo",
        median(HALF_GIB, Engine::Postcopy),
        direct,
        1.5,
    );
    passed &= breakdowns_add_up(pairs);
    for pair in pairs {
        let lost = pair.runs.iter().filter(|run| run["survived"] != true);
        let lost = lost.count();
        if lost > 0 {
            println!(
                "FAIL: {} {}: {lost} of {} runs lost the connection or part of the memory",
                pair.workload,
                pair.engine,
                pair.runs.len()
            );
            passed = false;
        }
    }
    passed
}

/// The parts of the downtime in livemig's report, against what the client saw: within 5 % of it. Where the
/// container was silent for longer when it ran already, and its memory was being fetched, that is what the client
/// saw, and the report has it beside the parts.
fn breakdowns_add_up(pairs: &[Pair]) -> bool {
    const WITHIN: f64 = 0.05;
    let mut good = true;
    for pair in pairs {
        let off = |run: &serde_json::Value| {
            let parts = run["breakdown"].as_array()?;
            let sum: f64 = parts.iter().map(|part| number(&part["ms"])).sum();
            let reported = sum.max(later(run));
            Some((reported - number(&run["gap_ms"])).abs() / number(&run["gap_ms"]))
        };
        let off: Vec<f64> = pair.runs.iter().filter_map(off).collect();
        if off.is_empty() {
            continue;
        }
        let off = Figures::from(off);
        let met = off.median <= WITHIN;
        let silent_later = pair
            .runs
            .iter()
            .filter(|run| later(run) > number(&run["downtime_ms"]));
        let silent_later = match silent_later.count() {
            0 => String::new(),
            many => format!(
                ", or in {many} of {} runs a later silence,",
                pair.runs.len()
            ),
        };
        println!(
            "{}: {} {}: the parts of the downtime{silent_later} are {:.1} % off the client's gap, at most {:.1} % \
             (the median is to be {:.0} % or less)",
            if met { "PASS" } else { "FAIL" },
            pair.workload,
            pair.engine,
            off.median * 100.0,
            off.max * 100.0,
            WITHIN * 100.0
        );
        good &= met;
    }
    good
}

/// How long the container read nothing while its memory was being fetched, in milliseconds.
fn later(run: &serde_json::Value) -> f64 {
    run["unread_ms"].as_f64().unwrap_or_default()
}
