//! Packets that a processor has taken on and not worked through yet.
//!
//! A packet that goes from one network namespace into another waits in a queue of the processor that
//! sent it, until that processor comes to it: a moment as a rule, longer when there is much to do.

use std::collections::BTreeSet;

/// The queues of all processors, from a moment on.
#[derive(Debug)]
pub struct Backlog {
    /// The processors, by their place in the file, whose queue was not seen empty yet.
    not_yet: Option<BTreeSet<usize>>,
}

impl Backlog {
    /// Packets that are under way now are meant.
    pub fn begin() -> Backlog {
        Backlog { not_yet: None }
    }

    /// Whether they have got through: every queue was seen empty once since. They are first in,
    /// first out, so what was in one has left it then.
    pub fn has_passed(&mut self) -> bool {
        let Ok(text) = std::fs::read_to_string("/proc/net/softnet_stat") else {
            return true;
        };
        let filled = filled(&text);
        let not_yet = match self.not_yet.take() {
            None => filled,
            Some(before) => before.intersection(&filled).copied().collect(),
        };
        let passed = not_yet.is_empty();
        self.not_yet = Some(not_yet);
        passed
    }
}

/// The processors with something in their queue: the twelfth number of each line, in hexadecimal
/// (`softnet_seq_show` of `net/core/net-procfs.c`). Kernels before 5.10 do not tell.
fn filled(text: &str) -> BTreeSet<usize> {
    text.lines()
        .enumerate()
        .filter(|(_, line)| {
            let length = line.split_whitespace().nth(11);
            length.is_some_and(|it| u32::from_str_radix(it, 16).is_ok_and(|it| it > 0))
        })
        .map(|(processor, _)| processor)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_with_something_in_its_queue_is_told_apart() {
        let line = |length: &str| format!("{}{length} 00000000\n", "00000000 ".repeat(11));
        let text = line("00000000") + &line("0000000a") + "00000000 00000000\n";
        assert_eq!(filled(&text), BTreeSet::from([1]));
    }
}
