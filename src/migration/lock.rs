//! One migration at a time for each container.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::podman::ContainerId;
use crate::{Error, Result};

/// What the names of locks end in.
const EXTENSION: &str = "lock";

/// Held for as long as a container is being moved. The kernel lets go of it when the process ends,
/// however it ends.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    _file: File,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // While it is still held: whoever opened the file before this finds that it is another.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Lock {
    /// Takes the lock of a container, and leaves in it who did.
    ///
    /// # Errors
    /// [`Error::Busy`] when another process has it.
    pub fn take(dir: &Path, container: &ContainerId, name: &str) -> Result<Lock> {
        std::fs::create_dir_all(dir).map_err(Error::file("make", dir))?;
        let path = dir.join(format!("{container}.{EXTENSION}"));
        loop {
            if let Some(lock) = Lock::try_take(&path, name)? {
                return Ok(lock);
            }
        }
    }

    /// Looks whether a container is being moved, without Podman: it does not answer questions about
    /// a container while it checkpoints it.
    ///
    /// # Errors
    /// [`Error::Busy`] when another process has its lock.
    pub fn look(dir: &Path, name_or_id: &str) -> Result<()> {
        for path in files(dir) {
            let Ok(file) = File::open(&path) else {
                continue;
            };
            let (holder, name) = written(&file);
            let id = path.file_name().and_then(|id| id.to_str());
            let is_it = name == name_or_id || id.is_some_and(|id| id.starts_with(name_or_id));
            if is_it && flock(&file, FlockOperation::NonBlockingLockShared).is_err() {
                return Err(Error::Busy {
                    container: name_or_id.to_owned(),
                    holder,
                });
            }
        }
        Ok(())
    }

    /// Removes the files of those who died with a lock in their hands.
    pub fn sweep(dir: &Path) {
        for path in files(dir) {
            if let Ok(file) = File::open(&path)
                && flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
            {
                // The lock does not depend on the file's being gone.
                let _ = std::fs::remove_file(&path);
            }
        }
    }

    /// Nothing when the last holder has removed the file before this one had it.
    fn try_take(path: &Path, name: &str) -> Result<Option<Lock>> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(Error::file("open", path))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let (holder, _) = written(&file);
            return Err(Error::Busy {
                container: name.to_owned(),
                holder,
            });
        }
        let own = file.metadata().map_err(Error::file("look at", path))?;
        match std::fs::metadata(path) {
            Ok(there) if there.ino() == own.ino() && there.dev() == own.dev() => {}
            _ => return Ok(None),
        }
        file.set_len(0)
            .and_then(|()| file.rewind())
            .map_err(Error::file("empty", path))?;
        write!(file, "process {}\n{name}", std::process::id())
            .map_err(Error::file("write", path))?;
        Ok(Some(Lock {
            path: path.to_owned(),
            _file: file,
        }))
    }
}

/// The locks in a directory: what is called after a container.
fn files(dir: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    paths.filter(|path| {
        let id = path.file_stem().and_then(|stem| stem.to_str());
        path.extension()
            .is_some_and(|extension| extension == EXTENSION)
            && id.is_some_and(|id| id.parse::<ContainerId>().is_ok())
    })
}

/// Who holds a lock, and the name of the container. Whoever it is may not have written yet: this is a
/// courtesy, not a condition.
fn written(mut file: &File) -> (String, String) {
    let mut text = String::new();
    let _ = (&mut file).take(512).read_to_string(&mut text);
    let (holder, name) = text.split_once('\n').unwrap_or((&text, ""));
    let holder = if holder.is_empty() {
        "another process"
    } else {
        holder
    };
    (holder.to_owned(), name.to_owned())
}
