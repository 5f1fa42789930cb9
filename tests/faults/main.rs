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
mod table;

use std::process::ExitCode;
use std::time::Instant;

use fault::Fault;
use moment::Moment;
use table::{Cell, Table};

/// The engines that move the container.
const ENGINES: [&str; 2] = ["rest", "direct"];

#[tokio::main]
async fn main() -> ExitCode {
    // `cargo test` starts this as well, and nextest asks it for tests.
    if !std::env::args().any(|argument| argument == "--run") {
        return ExitCode::SUCCESS;
    }
    let cells = chosen();
    let asked = std::env::var("LIVEMIG_FAULTS_ENGINES").unwrap_or_default();
    let engines = ENGINES
        .into_iter()
        .filter(|engine| asked.is_empty() || asked.split(',').any(|name| name.trim() == *engine));
    println!("{} cells for each engine\n\n{}", cells.len(), Cell::HEAD);
    let mut table = Table::default();
    for engine in engines {
        let mut scene = None;
        for (moment, fault) in cells.iter().copied() {
            let began = Instant::now();
            let (next, seen) = scene::strike(scene.take(), engine, moment, fault).await;
            scene = next;
            let cell = Cell::new(engine, moment, fault, seen, began.elapsed());
            println!("{cell}");
            table.add(cell);
        }
        if let Some(scene) = scene {
            scene.end().await;
        }
    }
    table.finish()
}

/// The cells to look at, moment by moment.
fn chosen() -> Vec<(Moment, Fault)> {
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
    for moment in Moment::ALL {
        for fault in Fault::ALL {
            if fault.can_strike(moment) && wanted(moment, fault) {
                cells.push((moment, fault));
            }
        }
    }
    assert!(!cells.is_empty(), "LIVEMIG_FAULTS={choice} chooses nothing");
    cells
}
