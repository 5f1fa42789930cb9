//! A running container as a stream of bytes.

use hyper::Method;

use super::client::Client;
use super::error::Result;
use super::id::ContainerId;
use super::request::{Call, Chunks, Purpose, Query, Upload};

/// How a container is checkpointed. The default is Podman's: everything but established TCP
/// connections, and the container is stopped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CheckpointOptions {
    /// Let the container run on. One whose cgroup was frozen beforehand stays frozen.
    pub leave_running: bool,
    /// Take established TCP connections along; without it they make the checkpoint fail.
    pub tcp_established: bool,
    /// Leave `rootfs-diff.tar` and `deleted.files` out of the archive. Volumes stay in it.
    pub ignore_rootfs: bool,
    /// Keep CRIU's logs and statistics on the source, in the container's userdata directory.
    pub keep: bool,
    /// Take file locks along.
    pub file_locks: bool,
    /// Have CRIU's statistics collected. They are in the archive as `stats-dump` in any case.
    pub print_stats: bool,
}

impl CheckpointOptions {
    fn query(&self) -> Query {
        Query::new()
            .with("export", "true")
            .flag("leaveRunning", self.leave_running)
            .flag("tcpEstablished", self.tcp_established)
            .flag("ignoreRootFS", self.ignore_rootfs)
            .flag("keep", self.keep)
            .flag("fileLocks", self.file_locks)
            .flag("printStats", self.print_stats)
    }
}

impl Client {
    /// Checkpoints a container and returns the archive, an uncompressed tar, as it comes.
    ///
    /// Podman sends the first byte when the dump is done and the archive is complete in its
    /// temporary directory; this returns then. From here on only the copying can fail. Dropping
    /// the stream does not undo the checkpoint: without `leave_running` the container is stopped.
    ///
    /// In the archive, in this order: `artifacts/`, `devshm-checkpoint.tar`, `config.dump`,
    /// `spec.dump`, `network.status`, `stats-dump`, `ctr.log`, `checkpoint/` with CRIU's images,
    /// `rootfs-diff.tar` and `deleted.files` unless `ignore_rootfs`, and `volumes/NAME.tar`.
    ///
    /// # Errors
    /// [`super::Refusal::NotRunning`] and [`super::Refusal::Runtime`] are the usual refusals. The
    /// container and its connections go on after either.
    pub async fn checkpoint(
        &self,
        id: &ContainerId,
        options: &CheckpointOptions,
    ) -> Result<Chunks> {
        let path = format!("/containers/{id}/checkpoint");
        let call = Call {
            purpose: Purpose::new("checkpoint", format!("container {}", id.short())),
            method: Method::POST,
            path: &path,
            query: options.query(),
            wait: self.timeouts.checkpoint,
        };
        Ok(self.socket.send(call, Upload::empty()).await?.chunks())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_podmans_keys() {
        let options = CheckpointOptions {
            leave_running: true,
            tcp_established: true,
            ignore_rootfs: true,
            keep: true,
            file_locks: true,
            print_stats: true,
        };
        assert_eq!(
            options.query().as_str(),
            "?export=true&leaveRunning=true&tcpEstablished=true&ignoreRootFS=true&keep=true\
             &fileLocks=true&printStats=true"
        );
        assert_eq!(
            CheckpointOptions::default().query().as_str(),
            "?export=true"
        );
    }
}
