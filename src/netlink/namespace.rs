//! Network namespaces: working in another one without leaving one's own.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{Error, Result};

/// A network namespace. Cheap to clone; it exists as long as one of the clones does.
#[derive(Debug, Clone)]
pub struct Namespace {
    file: Arc<File>,
    path: PathBuf,
}

impl Namespace {
    /// The namespace that a file stands for: `/run/netns/NAME`, or `/proc/PID/ns/net`.
    pub fn path(path: &Path) -> Result<Namespace> {
        match File::open(path) {
            Ok(file) => Ok(Namespace {
                file: Arc::new(file),
                path: path.to_owned(),
            }),
            Err(source) => Err(Error::NamespaceOpen {
                path: path.to_owned(),
                source,
            }),
        }
    }

    /// The namespace of a process: a container's, given the process that Podman names as its own.
    pub fn of_pid(pid: u32) -> Result<Namespace> {
        Namespace::path(Path::new(&format!("/proc/{pid}/ns/net")))
    }

    /// The namespace of the calling thread.
    pub fn current() -> Result<Namespace> {
        Namespace::path(Path::new("/proc/thread-self/ns/net"))
    }

    /// Runs `work` in this namespace and returns what it returned.
    ///
    /// It runs in a thread of its own that ends with it, so nothing of the caller's moves. Sockets
    /// opened in it stay in the namespace wherever they are used later. Blocks until it is done.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let thread_error = |what| Error::Thread {
            path: self.path.clone(),
            what,
        };
        std::thread::scope(|scope| {
            std::thread::Builder::new()
                .name("livemig-netns".to_owned())
                .spawn_scoped(scope, || {
                    move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))
                        .map_err(|errno| Error::NamespaceEnter {
                            path: self.path.clone(),
                            source: errno.into(),
                        })?;
                    Ok(work())
                })
                .map_err(|_| thread_error("could not be started"))?
                .join()
                .unwrap_or_else(|_| Err(thread_error("panicked")))
        })
    }
}
