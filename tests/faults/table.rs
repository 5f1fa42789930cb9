//! The table, for people as it grows, and for programs at its end.

use std::fmt;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};

use super::ENGINES;
use super::fault::Fault;
use super::moment::Moment;
use super::scene::Seen;

/// One row.
pub struct Cell {
    engine: &'static str,
    moment: Moment,
    fault: Fault,
    seen: Seen,
    took: Duration,
}

impl Cell {
    /// What stands over the columns.
    pub const HEAD: &str = "engine  moment     fault                      exit    runs on  connection  longest gap/ms  leftovers  took/s";

    pub fn new(
        engine: &'static str,
        moment: Moment,
        fault: Fault,
        seen: Seen,
        took: Duration,
    ) -> Cell {
        Cell {
            engine,
            moment,
            fault,
            seen,
            took,
        }
    }

    fn json(&self) -> Value {
        let seen = &self.seen;
        json!({
            "engine": self.engine,
            "phase": self.moment.phase(),
            "moment": self.moment.name(),
            "fault": self.fault.name(),
            "exit": seen.exit,
            "runs_on": seen.runs_on.join(", "),
            "copies": seen.runs_on.len(),
            "connection": seen.connection,
            "longest_gap_ms": seen.longest_gap_ms,
            "leftovers": seen.leftovers.len(),
            "left": seen.leftovers,
            "failure": seen.failure,
            "took_s": self.took.as_secs_f64(),
        })
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seen = &self.seen;
        write!(
            f,
            "{:<7} {:<10} {:<26} {:<7} {:<8} {:<11} {:>14.0} {:>10} {:>7.1}",
            self.engine,
            self.moment.name(),
            self.fault.name(),
            seen.exit,
            if seen.runs_on.is_empty() {
                "nowhere".to_owned()
            } else {
                seen.runs_on.join("+")
            },
            seen.connection,
            seen.longest_gap_ms,
            seen.leftovers.len(),
            self.took.as_secs_f64(),
        )?;
        // The rest is in the file.
        for line in seen.leftovers.iter().take(8) {
            write!(f, "\n          {line}")?;
        }
        if let Some(failure) = &seen.failure {
            let first = failure.lines().next().unwrap_or_default();
            write!(f, "\n          {first}")?;
        }
        Ok(())
    }
}

/// All rows.
pub struct Table(Vec<Cell>);

impl Table {
    /// In the order of engines, moments and faults, whatever was looked at first.
    pub fn of(mut rows: Vec<Cell>) -> Table {
        let moment = |cell: &Cell| Moment::ALL.iter().position(|other| *other == cell.moment);
        let fault = |cell: &Cell| Fault::ALL.iter().position(|other| *other == cell.fault);
        let engine = |cell: &Cell| ENGINES.iter().position(|other| *other == cell.engine);
        rows.sort_by_key(|cell| (engine(cell), moment(cell), fault(cell)));
        Table(rows)
    }

    /// Writes it down, and says whether every cell is as it has to be.
    pub fn finish(&self) -> ExitCode {
        let rows: Vec<Value> = self.0.iter().map(Cell::json).collect();
        let directory = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/target/faults"));
        let path = directory.join("table.json");
        std::fs::create_dir_all(directory)
            .and_then(|()| std::fs::write(&path, format!("{:#}\n", json!(rows))))
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        println!("\nall of it: target/faults/table.json");
        let bad: Vec<&Cell> = self.0.iter().filter(|cell| cell.seen.is_bad()).collect();
        if bad.is_empty() {
            println!(
                "PASS: in each of {} cells one copy runs, the connection went on, nothing is left",
                self.0.len()
            );
            return ExitCode::SUCCESS;
        }
        println!("FAIL: {} of {} cells:", bad.len(), self.0.len());
        for cell in bad {
            println!(
                "  {} {}/{}",
                cell.engine,
                cell.moment.name(),
                cell.fault.name()
            );
        }
        ExitCode::FAILURE
    }
}
