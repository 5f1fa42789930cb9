//! What a migration has changed on this host, on disk before it is changed.
//!
//! A journal is a file of JSON lines, one per [`Effect`]. A line is written and synced *before* its
//! effect, so that after a crash between any two lines of code the file names at least all that there
//! is to undo; undoing is idempotent, so naming one thing too many does no harm.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::effect::Effect;
use crate::Config;
use crate::agent::protocol::MigrationId;

/// More than this is no journal of ours. A migration of a hundred thousand flows needs a third.
const LARGEST: u64 = 64 << 20;

/// A journal could not be kept.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The process that keeps it is still at work.
    #[error("the migration of the journal {} is still under way", path.display())]
    InUse {
        /// Which file.
        path: PathBuf,
    },
    /// The file system said no.
    #[error("cannot {doing} the journal {}: {source}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A line in the middle is not a journal's.
    #[error("the journal {} is damaged in line {line}: {source}", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Which line, counted from 1.
        line: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// The state that a journal speaks of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "kebab-case")]
enum Line {
    /// About to be done.
    Will { effect: Effect },
    /// From here on the migration is only ever finished, never undone.
    Committed,
    /// The operator has said that the container is this host's, whatever the destination says.
    KeptHere,
    /// All is undone but what the destination has still to be told.
    Owed,
}

/// An open journal. For as long as it is, nobody else can open it: a migration that is under way is
/// not taken for one that was interrupted.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    effects: Vec<Effect>,
    committed: bool,
    kept_here: bool,
}

impl Journal {
    /// Begins the journal of a migration.
    ///
    /// # Errors
    /// When the directory or the file cannot be made, or the file is there already.
    pub fn create(dir: &Path, migration: &MigrationId) -> Result<Journal, JournalError> {
        let path = dir.join(format!("{migration}.jsonl"));
        let io = |doing| {
            let path = path.clone();
            move |source| JournalError::Io {
                doing,
                path,
                source,
            }
        };
        std::fs::create_dir_all(dir).map_err(io("make the directory of"))?;
        let file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(io("begin"))?;
        own(&file, &path)?;
        // The name itself has to survive a power cut, not only what is in the file.
        sync_directory(&path).map_err(io("sync the directory of"))?;
        Ok(Journal {
            path,
            file,
            effects: Vec::new(),
            committed: false,
            kept_here: false,
        })
    }

    /// Reads a journal that was left behind, to finish or unwind it.
    ///
    /// A last line that a crash cut short is cut off: its effect had not begun.
    ///
    /// # Errors
    /// When the file cannot be read or is not a journal; [`JournalError::InUse`] when the process that
    /// keeps it is alive.
    pub fn open(path: &Path) -> Result<Journal, JournalError> {
        let io = |doing| {
            move |source| JournalError::Io {
                doing,
                path: path.to_owned(),
                source,
            }
        };
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .open(path)
            .map_err(io("open"))?;
        own(&file, path)?;
        let mut text = Vec::new();
        (&file)
            .take(LARGEST)
            .read_to_end(&mut text)
            .map_err(io("read"))?;
        let whole = text
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |end| end + 1);
        if whole < text.len() && (text.len() as u64) < LARGEST {
            // What is written next must not continue it.
            file.set_len(whole as u64).map_err(io("cut"))?;
        }
        let mut effects = Vec::new();
        let (mut committed, mut kept_here) = (false, false);
        for (index, line) in text[..whole]
            .split_inclusive(|byte| *byte == b'\n')
            .enumerate()
        {
            match serde_json::from_slice(line) {
                Ok(Line::Will { effect }) => effects.push(effect),
                Ok(Line::Committed) => committed = true,
                Ok(Line::KeptHere) => kept_here = true,
                Ok(Line::Owed) => effects.retain(Effect::is_owed),
                Err(source) => {
                    return Err(JournalError::Damaged {
                        path: path.to_owned(),
                        line: index + 1,
                        source,
                    });
                }
            }
        }
        Ok(Journal {
            path: path.to_owned(),
            file,
            effects,
            committed,
            kept_here,
        })
    }

    /// Writes down what is about to be done, all of it with one sync.
    ///
    /// # Errors
    /// When it cannot be written; then the effects must not be begun.
    pub fn will(&mut self, effects: impl IntoIterator<Item = Effect>) -> Result<(), JournalError> {
        let effects: Vec<Effect> = effects.into_iter().collect();
        let lines = effects.iter().cloned().map(|effect| Line::Will { effect });
        self.append(lines)?;
        self.effects.extend(effects);
        Ok(())
    }

    /// Writes down that there is no way back.
    ///
    /// # Errors
    /// When it cannot be written; then it is not.
    pub fn commit(&mut self) -> Result<(), JournalError> {
        self.append([Line::Committed].into_iter())?;
        self.committed = true;
        Ok(())
    }

    /// Whether there is no way back.
    pub fn committed(&self) -> bool {
        self.committed
    }

    /// Writes down that the operator keeps the container here.
    ///
    /// # Errors
    /// When it cannot be written; then it is not.
    pub fn keep_here(&mut self) -> Result<(), JournalError> {
        self.append([Line::KeptHere].into_iter())?;
        self.kept_here = true;
        Ok(())
    }

    /// Whether the operator keeps the container here.
    pub fn kept_here(&self) -> bool {
        self.kept_here
    }

    /// Forgets all but what the destination has still to be told: the rest is undone, and what may be
    /// done to the container from now on is not to be.
    ///
    /// # Errors
    /// When it cannot be written; then everything will be undone again.
    pub fn owed(&mut self) -> Result<(), JournalError> {
        self.append([Line::Owed].into_iter())?;
        self.effects.retain(Effect::is_owed);
        Ok(())
    }

    /// What was done, or was about to be, in that order.
    pub fn effects(&self) -> &[Effect] {
        &self.effects
    }

    /// When the last line was written.
    ///
    /// # Errors
    /// When the file cannot be looked at.
    pub fn written(&self) -> Result<SystemTime, JournalError> {
        let modified = self.file.metadata().and_then(|about| about.modified());
        modified.map_err(|source| JournalError::Io {
            doing: "look at",
            path: self.path.clone(),
            source,
        })
    }

    /// Ends a journal that nothing needs any more.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub fn close(&self) -> Result<(), JournalError> {
        let io = |doing| {
            let path = self.path.clone();
            move |source| JournalError::Io {
                doing,
                path,
                source,
            }
        };
        match std::fs::remove_file(&self.path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(io("remove")(source))
            }
            // One that came back after a power cut would be followed a second time.
            _ => sync_directory(&self.path).map_err(io("sync the directory of")),
        }
    }

    /// Writes all lines, or none.
    fn append(&mut self, lines: impl Iterator<Item = Line>) -> Result<(), JournalError> {
        let io = |doing| {
            let path = self.path.clone();
            move |source| JournalError::Io {
                doing,
                path,
                source,
            }
        };
        let mut text = Vec::new();
        for line in lines {
            serde_json::to_writer(&mut text, &line).map_err(|source| io("write")(source.into()))?;
            text.push(b'\n');
        }
        let before = self.file.metadata().map_err(io("look at"))?.len();
        let written = self
            .file
            .write_all(&text)
            .map_err(io("write"))
            .and_then(|()| self.file.sync_data().map_err(io("sync")));
        if written.is_err() {
            // Part of it may be there. The error is worse than what this one could be.
            let _ = self.file.set_len(before);
        }
        written
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        // Closing it is not enough: a process that is just being started has the file as well, until it becomes
        // another program. What cannot be unlocked is, when that has happened.
        let _ = flock(&self.file, FlockOperation::NonBlockingUnlock);
    }
}

/// Takes possession of a journal for as long as its file is open.
fn own(file: &File, path: &Path) -> Result<(), JournalError> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(JournalError::InUse {
            path: path.to_owned(),
        }),
        Err(errno) => Err(JournalError::Io {
            doing: "lock",
            path: path.to_owned(),
            source: errno.into(),
        }),
    }
}

fn sync_directory(file: &Path) -> std::io::Result<()> {
    match file.parent() {
        Some(directory) => File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}

/// The number of the migration whose journal this is.
pub(crate) fn number_of(journal: &Path) -> String {
    let stem = journal.file_stem().unwrap_or_default();
    stem.to_string_lossy().into_owned()
}

/// The numbers of the migrations, from this host and to it, that have a journal: that have not ended.
pub(super) fn under_way(config: &Config) -> Result<BTreeSet<String>, JournalError> {
    let mut journals = left_behind(&config.outgoing_dir())?;
    journals.extend(left_behind(&config.incoming_dir())?);
    Ok(journals.iter().map(|path| number_of(path)).collect())
}

/// The journals that lie in a directory, oldest first.
///
/// # Errors
/// When the directory cannot be read; one that is not there has none.
pub fn left_behind(dir: &Path) -> Result<Vec<PathBuf>, JournalError> {
    let io = |source| JournalError::Io {
        doing: "look for",
        path: dir.to_owned(),
        source,
    };
    let entries = match std::fs::read_dir(dir) {
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(io)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(io)?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "jsonl")
        {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::effect::Asked;

    fn hop(user: &str) -> Effect {
        Effect::Hop {
            user: user.to_owned(),
        }
    }

    #[test]
    fn what_a_crash_cut_short_is_not_continued() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(dir.path(), &MigrationId::random().unwrap()).unwrap();
        journal.will([hop("first"), hop("second")]).unwrap();
        let path = journal.path.clone();
        drop(journal);
        let text = std::fs::read(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 3]).unwrap();

        let mut journal = Journal::open(&path).unwrap();
        assert_eq!(journal.effects(), [hop("first")]);
        journal.commit().unwrap();
        drop(journal);
        let journal = Journal::open(&path).unwrap();
        assert!(journal.committed());
        assert_eq!(journal.effects(), [hop("first")]);
    }

    #[test]
    fn what_is_owed_to_the_destination_is_all_that_is_left_of_one_kept_here() {
        let dir = tempfile::tempdir().unwrap();
        let migration = MigrationId::random().unwrap();
        let mut journal = Journal::create(dir.path(), &migration).unwrap();
        let destination = Effect::Destination {
            peer: "h2".to_owned(),
            migration,
            asked: Asked::Restore,
        };
        journal.will([hop("first"), destination.clone()]).unwrap();
        journal.keep_here().unwrap();
        let path = journal.path.clone();
        drop(journal);

        let mut journal = Journal::open(&path).unwrap();
        assert!(journal.kept_here() && !journal.committed());
        assert_eq!(journal.effects(), [hop("first"), destination.clone()]);
        journal.owed().unwrap();
        assert_eq!(journal.effects(), std::slice::from_ref(&destination));
        drop(journal);
        let journal = Journal::open(&path).unwrap();
        assert!(journal.kept_here());
        assert_eq!(journal.effects(), [destination]);
    }

    #[test]
    fn one_that_is_being_written_is_nobody_elses() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::create(dir.path(), &MigrationId::random().unwrap()).unwrap();
        let refused = Journal::open(&journal.path);
        assert!(matches!(refused, Err(JournalError::InUse { .. })));
        let path = journal.path.clone();
        drop(journal);
        Journal::open(&path).unwrap().close().unwrap();
        assert_eq!(left_behind(dir.path()).unwrap(), Vec::<PathBuf>::new());
    }
}
