//! What every bench has: figures of several runs, and a file with all of them.

// Each bench uses its own part of this.
#![allow(dead_code)]

pub mod svg;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde_json::{Value, json};

/// Whether this is to run at all. `cargo test --all-targets` starts benches as well, without the flag
/// that `cargo bench` gives.
pub fn wanted() -> bool {
    std::env::args().any(|argument| argument == "--bench")
}

/// A number from the environment, or what there is without it.
pub fn setting<T: FromStr>(name: &str, otherwise: T) -> T {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name} is not a number: {text}")),
        Err(_) => otherwise,
    }
}

/// A list of words from the environment, separated by commas, or what there is without it.
pub fn choice(name: &str, otherwise: &str) -> Vec<String> {
    let text = std::env::var(name).unwrap_or_else(|_| otherwise.to_owned());
    text.split(',').map(|word| word.trim().to_owned()).collect()
}

/// Writes a file below `target/bench`, and says so.
pub fn write(name: &str, content: &str) {
    let directory = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/target/bench"));
    let path: PathBuf = directory.join(name);
    std::fs::create_dir_all(directory)
        .and_then(|()| std::fs::write(&path, content))
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    println!("all of it: target/bench/{name}");
}

/// The same for JSON.
pub fn write_json(name: &str, content: &Value) {
    write(name, &format!("{content:#}\n"));
}

/// A number in JSON; what is none is not a number here either.
pub fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

/// Median, least and most of a figure of several runs.
#[derive(Debug, Clone, Copy)]
pub struct Figures {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Figures {
    /// Of a field of each run.
    pub fn of(runs: &[Value], key: &str) -> Figures {
        Figures::from(runs.iter().map(|run| number(&run[key])).collect::<Vec<_>>())
    }

    pub fn json(self) -> Value {
        json!({ "median": self.median, "min": self.min, "max": self.max })
    }
}

impl From<Vec<f64>> for Figures {
    fn from(mut values: Vec<f64>) -> Figures {
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            at(middle)
        } else {
            f64::midpoint(at(middle.wrapping_sub(1)), at(middle))
        };
        Figures {
            median,
            min: at(0),
            max: at(values.len().wrapping_sub(1)),
        }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.median.is_nan() {
            return f.pad("-");
        }
        f.pad(&format!(
            "{:.1} [{:.1} {:.1}]",
            self.median, self.min, self.max
        ))
    }
}
