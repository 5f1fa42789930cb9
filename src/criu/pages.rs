//! Memory pages on their way out of CRIU, and into its images at the other end.
//!
//! CRIU can send the pages that it dumps to a *page server* instead of writing them to files. At the source
//! livemig is that server ([`relay`]), and passes on what it hears; at the destination it writes what the
//! page server would have written ([`writer`]). So a container's memory goes from its processes into the
//! destination's memory, and lies nowhere in between.
//!
//! # The protocol
//! (`criu/page-xfer.c`.) Commands of 24 bytes, all numbers in the machine's byte order, here least significant
//! byte first: the command (16 bits) and its flags (16), a number of pages (32), an address (64), and
//! which memory it is part of (64: a type in the lowest 8, then a number). After an addition whose flags
//! say that the pages are present come the pages. CRIU waits for an answer after opening, after asking for
//! a parent, and at the end; the relay gives it, so none has to cross.

pub mod relay;
pub mod writer;

use super::{Error, Result};

/// The size of a page. (`PAGE_SIZE` of the architectures that CRIU runs on is 4 KiB in most kernels.)
pub(super) fn page_size() -> u64 {
    rustix::param::page_size() as u64
}

/// How long a command is, in bytes.
const COMMAND: usize = 24;
/// No run of pages that CRIU sends is longer, in pages: 1 TiB.
const MOST_PAGES: u32 = 1 << 28;

/// What a command says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Command {
    /// What follows is of this memory. CRIU waits to hear whether the memory has a parent.
    Open(Memory),
    /// Whether this memory has a parent.
    HasParent(Memory),
    /// A run of pages.
    Add(Memory, Run),
    /// That was all.
    Close,
}

/// Which memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Memory {
    /// Of the process with this number in its own namespace.
    Process(u64),
    /// Shared memory with this number.
    Shared(u64),
}

/// Pages one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    address: u64,
    pages: u32,
    flags: u32,
}

/// Something in a stream of pages.
enum Seen<'a> {
    Command(Command),
    /// A part of the pages of the last addition.
    Pages(&'a [u8]),
}

/// Reads a stream of pages, however it is cut.
#[derive(Debug, Default)]
struct Reader {
    /// A command of which a part has come.
    command: Vec<u8>,
    /// How many bytes of pages are still to come before the next command.
    left: u64,
    ended: bool,
}

impl Reader {
    /// Shows what is in the next piece.
    fn read<'a>(
        &mut self,
        mut piece: &'a [u8],
        mut show: impl FnMut(Seen<'a>) -> Result<()>,
    ) -> Result<()> {
        while !piece.is_empty() {
            if self.left > 0 {
                let most = piece
                    .len()
                    .min(usize::try_from(self.left).unwrap_or(usize::MAX));
                let (pages, rest) = piece.split_at(most);
                show(Seen::Pages(pages))?;
                self.left -= most as u64;
                piece = rest;
                continue;
            }
            if self.ended {
                return Err(Error::Pages("something follows the end"));
            }
            let missing = COMMAND - self.command.len();
            let (part, rest) = piece.split_at(missing.min(piece.len()));
            self.command.extend_from_slice(part);
            piece = rest;
            if let Ok(bytes) = <[u8; COMMAND]>::try_from(self.command.as_slice()) {
                self.command.clear();
                let command = Command::read(&bytes).ok_or(Error::Pages("an unknown command"))?;
                match command {
                    Command::Add(_, run) => self.left = run.content(),
                    Command::Close => self.ended = true,
                    Command::Open(_) | Command::HasParent(_) => {}
                }
                show(Seen::Command(command))?;
            }
        }
        Ok(())
    }
}

impl Run {
    /// `PE_PRESENT` of `criu/include/pagemap.h`: the pages themselves follow.
    const PRESENT: u32 = 1 << 2;

    /// How many bytes of pages follow.
    fn content(self) -> u64 {
        match self.flags & Run::PRESENT {
            0 => 0,
            _ => u64::from(self.pages) * page_size(),
        }
    }
}

impl Memory {
    /// `PS_TYPE_PID` and `PS_TYPE_SHMEM`.
    fn read(number: u64) -> Option<Memory> {
        match number & 0xff {
            1 => Some(Memory::Process(number >> 8)),
            2 => Some(Memory::Shared(number >> 8)),
            _ => None,
        }
    }
}

impl Command {
    /// Reads one; nothing if it is none that CRIU sends while it dumps.
    fn read(bytes: &[u8; COMMAND]) -> Option<Command> {
        let number = |from: usize, bytes: &[u8]| -> u64 {
            let part = bytes.iter().skip(from).take(8).rev();
            part.fold(0, |number, byte| number << 8 | u64::from(*byte))
        };
        let first = number(0, &bytes[..8]);
        // The halves of the first eight bytes.
        let (word, pages) = (first as u32, (first >> 32) as u32);
        let (command, flags) = (word & 0xffff, word >> 16);
        let memory = Memory::read(number(16, bytes));
        // `PS_IOV_OPEN2`, `PS_IOV_PARENT`, `PS_IOV_ADD_F`, `PS_IOV_CLOSE`, `PS_IOV_FORCE_CLOSE`.
        match command {
            4 => memory.map(Command::Open),
            5 => memory.map(Command::HasParent),
            6 if pages <= MOST_PAGES => Some(Command::Add(
                memory?,
                Run {
                    address: number(8, &bytes[..16]),
                    pages,
                    flags,
                },
            )),
            0x1023 | 0x1024 => Some(Command::Close),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As CRIU 4.2 sends it.
    pub(super) fn command(word: u32, pages: u32, address: u64, memory: u64) -> [u8; COMMAND] {
        let mut bytes = [0; COMMAND];
        bytes[..4].copy_from_slice(&word.to_le_bytes());
        bytes[4..8].copy_from_slice(&pages.to_le_bytes());
        bytes[8..16].copy_from_slice(&address.to_le_bytes());
        bytes[16..].copy_from_slice(&memory.to_le_bytes());
        bytes
    }

    #[test]
    fn commands_are_read() {
        let open = Command::read(&command(4, 0, 0, 7 << 8 | 1));
        assert_eq!(open, Some(Command::Open(Memory::Process(7))));
        let run = Run {
            address: 0x7f00_1234_5000,
            pages: 3,
            flags: Run::PRESENT,
        };
        let add = Command::read(&command(6 | 4 << 16, 3, run.address, 9 << 8 | 2));
        assert_eq!(add, Some(Command::Add(Memory::Shared(9), run)));
        assert_eq!(run.content(), 3 * page_size());
        assert_eq!(
            Command::read(&command(0x1023, 0, 0, 0)),
            Some(Command::Close)
        );
    }

    #[test]
    fn others_are_none() {
        // An unknown command, an unknown kind of memory, a run without an end.
        for bytes in [
            command(7, 0, 0, 1),
            command(4, 0, 0, 3),
            command(6, u32::MAX, 0, 1),
        ] {
            assert_eq!(Command::read(&bytes), None);
        }
    }
}
