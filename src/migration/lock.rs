//! One migration at a time for each container.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

use crate::podman::ContainerId;
use crate::{Error, Result};

/// Held for as long as a container is being moved. The kernel lets go of it when the process ends,
/// however it ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock of a container, and leaves in it who did.
    ///
    /// # Errors
    /// [`Error::Busy`] when another process has it.
    pub fn take(dir: &Path, container: &ContainerId, name: &str) -> Result<Lock> {
        std::fs::create_dir_all(dir).map_err(Error::file("make", dir))?;
        let path = dir.join(container.as_str());
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(Error::file("open", &path))?;
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
        file.set_len(0)
            .and_then(|()| file.rewind())
            .map_err(Error::file("empty", &path))?;
        write!(file, "process {}", std::process::id()).map_err(Error::file("write", &path))?;
        Ok(Lock { _file: file })
    }
}
