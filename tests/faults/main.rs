//! `make test-faults`: every fault at every moment of a migration, and what became of the container.
//!
//! A cell is one migration that is brought to a [moment](moment), [struck](fault) there, and recovered
//! from as an operator would: what was broken is mended, the agent runs again, `livemig recover` is
//! called on the source. Then the [scene](scene) says where the container runs, by what both Podmans and
//! both hosts' processes say, whether the client's one connection went on, how long its longest silence
//! was, and what is left on either host.
//!
//! `LIVEMIG_FAULTS` chooses cells: `freeze/agent-killed,restore,/link-cut-1s` is one cell, all of a
//! moment, and one fault at all moments; `LIVEMIG_FAULTS_ENGINES`, one engine. The table is printed as it grows, and is in
//! `target/faults/table.json`. A program of its own rather than tests: it is one table, and it takes
//! half an hour.

#[path = "../lab/mod.rs"]
mod lab;

mod fault;
mod moment;
mod scene;
mod soak;
mod table;

use std::process::ExitCode;
use std::time::Instant;

use fault::Fault;
use futures::future::join_all;
use moment::Moment;
use scene::Scene;
use table::{Cell, Table};

/// The engines that move the container. The last only when it is asked for: once its packets are let go the
/// container needs both hosts until its memory has followed, and is lost if one of them fails.
const ENGINES: [&str; 3] = ["rest", "direct", "postcopy"];

#[tokio::main]
async fn main() -> ExitCode {
    let asked_to = |what: &str| std::env::args().any(|argument| argument == what);
    if asked_to("--soak") {
        return soak::soak().await;
    }
    // `cargo test` starts this as well, and nextest asks it for tests.
    if !asked_to("--run") {
        return ExitCode::SUCCESS;
    }
    let (waiting, working): (Vec<_>, Vec<_>) = chosen()
        .into_iter()
        .partition(|(_, _, fault)| fault.takes_long());
    println!("{} cells\n\n{}", waiting.len() + working.len(), Cell::HEAD);
    // Most of the time that a link is cut for, nothing happens: others are struck meanwhile.
    let mut lanes = vec![working];
    for engine in ENGINES {
        lanes.push(
            waiting
                .iter()
                .filter(|cell| cell.0 == engine)
                .copied()
                .collect(),
        );
    }
    let rows = join_all(lanes.into_iter().map(strike_all)).await;
    let rows = rows.into_iter().flatten().collect();
    Table::of(rows).finish()
}

/// Strikes cells one after the other, on the same hosts for as long as they are clean.
async fn strike_all(cells: Vec<(&'static str, Moment, Fault)>) -> Vec<Cell> {
    let mut rows = Vec::new();
    let mut scene: Option<Scene> = None;
    for (engine, moment, fault) in cells {
        let began = Instant::now();
        let (next, seen) = scene::strike(scene.take(), engine, moment, fault).await;
        scene = next;
        let cell = Cell::new(engine, moment, fault, seen, began.elapsed());
        println!("{cell}");
        rows.push(cell);
    }
    if let Some(scene) = scene {
        scene.end().await;
    }
    rows
}

/// The cells to look at, engine by engine and moment by moment.
fn chosen() -> Vec<(&'static str, Moment, Fault)> {
    let asked = std::env::var("LIVEMIG_FAULTS_ENGINES").unwrap_or_default();
    let asked: Vec<&str> = asked
        .split(',')
        .map(str::trim)
        .filter(|name| !name.is_empty())
        .collect();
    for name in &asked {
        assert!(
            ENGINES.contains(name),
            "LIVEMIG_FAULTS_ENGINES: there is no engine {name}"
        );
    }
    let choice = std::env::var("LIVEMIG_FAULTS").unwrap_or_default();
    let words: Vec<(&str, &str)> = choice
        .split(',')
        .filter(|word| !word.trim().is_empty())
        .map(|word| word.trim().split_once('/').unwrap_or((word.trim(), "")))
        .collect();
    for (moment, fault) in &words {
        let known = (moment.is_empty() || Moment::ALL.iter().any(|m| m.name() == *moment))
            && (fault.is_empty() || Fault::ALL.iter().any(|f| f.name() == *fault));
        assert!(known, "LIVEMIG_FAULTS: there is no cell {moment}/{fault}");
    }
    let wanted = |moment: Moment, fault: Fault| {
        words.is_empty()
            || words.iter().any(|(m, f)| {
                (m.is_empty() || *m == moment.name()) && (f.is_empty() || *f == fault.name())
            })
    };
    let mut cells = Vec::new();
    for engine in ENGINES {
        let wanted_too = match asked.is_empty() {
            true => engine != "postcopy",
            false => asked.contains(&engine),
        };
        if !wanted_too {
            continue;
        }
        for moment in Moment::ALL {
            for fault in Fault::ALL {
                if fault.can_strike(moment) && wanted(moment, fault) {
                    cells.push((engine, moment, fault));
                }
            }
        }
    }
    assert!(!cells.is_empty(), "LIVEMIG_FAULTS={choice} chooses nothing");
    cells
}
