//! The memory of a container that is coming, as CRIU's images.
//!
//! It is kept in a directory in memory, which nobody else can look into: what was copied while the container
//! ran at its source, each round with a link to the one before, and in the end the images of the frozen one.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{Stream, TryStreamExt};
use tokio_util::io::{ReaderStream, StreamReader};

use crate::bundle;
use crate::criu::pages::Layout;
use crate::criu::pages::writer::PageWriter;
use crate::{Error, migration};

/// No source makes more rounds than this.
const MOST_ROUNDS: usize = 64;

/// Where it is, and how much of it is here.
#[derive(Debug)]
pub(super) struct Memory {
    staging: PathBuf,
    layout: Layout,
    rounds: usize,
    /// CRIU's images of the frozen container.
    pub images: PathBuf,
    /// CRIU's log and statistics.
    pub work: PathBuf,
}

impl Memory {
    /// Makes the directory, for what a CRIU sends that lays its commands out like this.
    ///
    /// # Errors
    /// When that cannot be done, or it is there already.
    pub fn begin(staging: PathBuf, layout: Layout) -> Result<Memory, Error> {
        let (images, work) = migration::staging(&staging)?;
        Ok(Memory {
            staging,
            layout,
            rounds: 0,
            images,
            work,
        })
    }

    /// Takes what is copied while the container runs at the source.
    ///
    /// # Errors
    /// As [`Memory::take_pages`]; [`Error::OutOfOrder`] if it is not the next round.
    pub async fn take_round<S>(&mut self, number: usize, pages: S) -> Result<(), Error>
    where
        S: Stream<Item = bundle::Result<Bytes>> + Send,
    {
        if number != self.rounds + 1 || number > MOST_ROUNDS {
            return Err(Error::OutOfOrder("round before"));
        }
        let (directory, _) = migration::round_directories(&self.staging, number);
        migration::make_private(&directory)?;
        self.link_to_parent(&directory)?;
        self.rounds = number;
        self.write(&directory, pages).await
    }

    /// Takes the pages of the frozen container, or what the rounds before do not have of them.
    ///
    /// # Errors
    /// Those of the stream; [`crate::criu::Error::Pages`] if it is not CRIU's, and
    /// [`crate::criu::Error::Write`] if there is no room.
    pub async fn take_pages<S>(&self, pages: S) -> Result<(), Error>
    where
        S: Stream<Item = bundle::Result<Bytes>> + Send,
    {
        self.write(&self.images, pages).await
    }

    /// Takes CRIU's other images. Returns what follows them.
    ///
    /// # Errors
    /// Those of the stream, and of files that cannot be written.
    pub async fn take_images(
        &self,
        content: BoxStream<'static, bundle::Result<Bytes>>,
    ) -> Result<impl Stream<Item = bundle::Result<Bytes>> + Send + use<>, Error> {
        let mut reader = StreamReader::new(content.map_err(std::io::Error::other));
        bundle::write_images(&mut reader, &self.images).await?;
        let rest = ReaderStream::new(reader);
        Ok(rest.map_err(bundle::Error::from_reader))
    }

    /// No round comes any more: the images have the last one for a parent.
    ///
    /// # Errors
    /// When the link cannot be made.
    pub fn no_more_rounds(&self) -> Result<(), Error> {
        self.link_to_parent(&self.images)
    }

    /// CRIU finds the round before by a link (`CR_PARENT_LINK` in `criu/include/image.h`).
    fn link_to_parent(&self, directory: &Path) -> Result<(), Error> {
        if self.rounds == 0 {
            return Ok(());
        }
        let link = directory.join("parent");
        let parent = migration::parent_round(self.rounds);
        std::os::unix::fs::symlink(parent, &link).map_err(Error::file("make", &link))
    }

    async fn write<S>(&self, directory: &Path, pages: S) -> Result<(), Error>
    where
        S: Stream<Item = bundle::Result<Bytes>> + Send,
    {
        let mut writer = PageWriter::new(directory, self.layout);
        let mut pages = std::pin::pin!(pages);
        while let Some(piece) = pages.try_next().await? {
            // Into memory, which does not wait.
            writer.feed(&piece)?;
        }
        let bytes = writer.finish()?;
        tracing::debug!(bytes, "memory has come");
        Ok(())
    }
}
