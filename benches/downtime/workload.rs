//! What the container does that is moved.

use std::fmt;

/// The port of every workload, published under the same number.
pub const PORT: &str = "7000";

/// A container with one thread and a socket, and with so much memory beside that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Workload {
    /// Resident memory in MiB, none of it zero, compressible, or like another; 0 for next to none.
    pub mib: u64,
    /// How much of it is written to per second, in percent.
    pub percent: u64,
}

impl Workload {
    /// One connection and nothing else.
    pub const ECHO: Workload = Workload { mib: 0, percent: 0 };

    /// Those of `make bench`: idle, and with a tenth of the memory written to per second.
    pub fn all() -> Vec<Workload> {
        let sizes = [64, 512, 2048];
        let idle = sizes.map(|mib| Workload { mib, percent: 0 });
        let dirty = sizes.map(|mib| Workload { mib, percent: 10 });
        [Workload::ECHO]
            .into_iter()
            .chain(idle)
            .chain(dirty)
            .collect()
    }

    /// The arguments of the workload program.
    pub fn command(self) -> Vec<String> {
        if self == Workload::ECHO {
            return vec!["echo".into(), PORT.into()];
        }
        let numbers = [self.mib.to_string(), self.percent.to_string()];
        [String::from("touch")]
            .into_iter()
            .chain(numbers)
            .chain([PORT.into()])
            .collect()
    }

    /// Pages that must be there, and right, after the move.
    pub fn pages(self) -> u64 {
        self.mib * 256
    }
}

/// The name that results have: `echo`, `64MiB`, `2GiB-dirty`.
impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = match self.mib {
            0 => "echo".to_owned(),
            mib if mib >= 1024 && mib % 1024 == 0 => format!("{}GiB", mib / 1024),
            mib => format!("{mib}MiB"),
        };
        let dirty = if self.percent > 0 { "-dirty" } else { "" };
        f.pad(&format!("{size}{dirty}"))
    }
}
