//! One migration at a time for each container.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::podman::ContainerId;
use crate::{Error, Result};

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
        let path = dir.join(format!("{container}.lock"));
        loop {
            if let Some(lock) = Lock::try_take(&path, name)? {
                return Ok(lock);
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
            let mut holder = String::new();
            // Whoever holds it may not have written yet; a name is a courtesy, not a condition.
            let _ = (&file).take(256).read_to_string(&mut holder);
            let holder = if holder.is_empty() {
                "another process".to_owned()
            } else {
                holder
            };
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
        write!(file, "process {}", std::process::id()).map_err(Error::file("write", path))?;
        Ok(Some(Lock {
            path: path.to_owned(),
            _file: file,
        }))
    }
}
