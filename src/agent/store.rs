//! Small files that hold trust: private, whole or absent, and still there after a power cut.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{Error, Result};

/// Creates a directory that only its owner can enter, unless there is one.
pub(super) fn private_directory(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(Error::file("create the directory", path))
}

/// Whether a file of the same name may be replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Existing {
    Replace,
    Keep,
}

/// Writes a file that nobody ever sees half-written, with mode 0600.
///
/// With [`Existing::Keep`], a file that is there already stays, and `false` is returned.
pub(super) fn write(
    directory: &Path,
    name: &str,
    content: &[u8],
    existing: Existing,
) -> Result<bool> {
    let target = directory.join(name);
    let (mut file, temporary) = temporary(directory)?;
    let placed = file
        .write_all(content)
        .and_then(|()| file.sync_all())
        .and_then(|()| match existing {
            Existing::Replace => fs::rename(&temporary, &target).map(|()| true),
            // link(2) fails where rename(2) would replace.
            Existing::Keep => match fs::hard_link(&temporary, &target) {
                Ok(()) => Ok(true),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
                Err(error) => Err(error),
            },
        });
    if !matches!((&placed, existing), (Ok(true), Existing::Replace)) {
        // The name of the temporary file is still there. Nothing depends on its removal.
        if let Err(error) = fs::remove_file(&temporary) {
            tracing::debug!(path = %temporary.display(), %error, "a temporary file stays behind");
        }
    }
    let placed = placed.map_err(Error::file("write", &target))?;
    sync_directory(directory)?;
    Ok(placed)
}

/// Removes a file; `false` if there was none. Of several who do so at once, one gets `true`.
pub(super) fn remove(directory: &Path, name: &str) -> Result<bool> {
    let path = directory.join(name);
    match fs::remove_file(&path) {
        Ok(()) => {
            sync_directory(directory)?;
            Ok(true)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::file("remove", path)(error)),
    }
}

/// Reads a file, or `None` if there is none. Symbolic links are not followed.
pub(super) fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    match open(path) {
        Ok(file) => read_open(file, path, limit).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::file("open", path)(error)),
    }
}

/// Opens a file for reading. Symbolic links are not followed, and nothing waits for a pipe.
pub(super) fn open(path: &Path) -> io::Result<File> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    OpenOptions::new()
        .read(true)
        // The bits of the open flags fit into the C int that they were made from.
        .custom_flags(flags.bits() as i32)
        .open(path)
}

/// Reads an open file to its end.
pub(super) fn read_open(file: File, path: &Path, limit: u64) -> Result<Vec<u8>> {
    let mut content = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut content)
        .map_err(Error::file("read", path))?;
    if content.len() as u64 > limit {
        return Err(Error::FileTooLarge {
            path: path.into(),
            limit,
        });
    }
    Ok(content)
}

/// The names in a directory that end in `.json`, without that ending; empty if it does not exist.
pub(super) fn names(directory: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::file("list", directory)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(Error::file("list", directory))?;
        if let Some(name) = entry.file_name().to_str()
            && let Some(stem) = name.strip_suffix(".json")
            && !stem.starts_with('.')
        {
            names.push(stem.to_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Keeps other processes and threads from changing a directory's files until it is dropped.
pub(super) fn lock(directory: &Path) -> Result<File> {
    wait_for_lock(directory, rustix::fs::FlockOperation::LockExclusive)
}

fn wait_for_lock(directory: &Path, how: rustix::fs::FlockOperation) -> Result<File> {
    let file = File::open(directory).map_err(Error::file("open", directory))?;
    rustix::fs::flock(&file, how).map_err(|error| Error::file("lock", directory)(error.into()))?;
    Ok(file)
}

/// As [`lock_shared`], after whoever is alone.
pub(super) fn lock_shared_waiting(directory: &Path) -> Result<File> {
    wait_for_lock(directory, rustix::fs::FlockOperation::LockShared)
}

/// Keeps others from [`lock_alone`] until it is dropped, and lets others do the same. `None` if somebody
/// is alone.
pub(super) fn lock_shared(directory: &Path) -> Result<Option<File>> {
    try_lock(directory, rustix::fs::FlockOperation::NonBlockingLockShared)
}

/// Keeps others from any lock of a directory until it is dropped. `None` if somebody has one.
pub(super) fn lock_alone(directory: &Path) -> Result<Option<File>> {
    try_lock(
        directory,
        rustix::fs::FlockOperation::NonBlockingLockExclusive,
    )
}

fn try_lock(directory: &Path, how: rustix::fs::FlockOperation) -> Result<Option<File>> {
    let file = File::open(directory).map_err(Error::file("open", directory))?;
    match rustix::fs::flock(&file, how) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(Error::file("lock", directory)(error.into())),
    }
}

/// Gives a file the name of another, which is gone then. Whatever happens, there is one of that name.
pub(super) fn replace(directory: &Path, from: &str, to: &str) -> Result<()> {
    let (from, to) = (directory.join(from), directory.join(to));
    fs::rename(&from, &to).map_err(Error::file("replace", &to))?;
    sync_directory(directory)
}

/// Random bytes from the system.
pub(super) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(Error::Random)?;
    Ok(bytes)
}

fn temporary(directory: &Path) -> Result<(File, PathBuf)> {
    let name = format!(".new-{:016x}", u64::from_ne_bytes(random()?));
    let path = directory.join(name);
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .map_err(Error::file("create", &path))?;
    Ok((file, path))
}

fn sync_directory(directory: &Path) -> Result<()> {
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(Error::file("sync the directory", directory))
}
