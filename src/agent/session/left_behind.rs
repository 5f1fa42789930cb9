//! Migrations that an earlier agent of this host began, and of which there is nothing but the journal.

use super::super::protocol::{MigrationId, Nothing, Stage, Undone};
use super::Sessions;
use super::end::{let_in, let_memory_go};
use crate::Error;
use crate::migration::{self, Effect, Journal, JournalError};
use crate::podman::{self, Container, ContainerId};

impl Sessions {
    /// Tidies up after an agent that ended badly: what it had only prepared is undone.
    ///
    /// A container that runs stays: its source may have heard that it does, and only the source knows
    /// whether it is to stay for good. Returns a sentence about each.
    ///
    /// # Errors
    /// When a journal cannot be read, or Podman not be asked.
    pub async fn resume(&self) -> Result<Vec<String>, Error> {
        let mut told = Vec::new();
        for path in migration::left_behind(&self.config.incoming_dir())? {
            let journal = match Journal::open(&path) {
                // Another agent is at work on it.
                Err(JournalError::InUse { .. }) => continue,
                journal => journal?,
            };
            // Also one that has ended: this host may have crashed after the source let go of it.
            let ran = self.brought_by(&journal).await?.filter(|container| {
                !matches!(
                    container.status,
                    podman::Status::Created | podman::Status::Initialized
                )
            });
            let id = migration::number_of(&path);
            if journal.committed() {
                let_in(&journal).await?;
                let_memory_go(&journal)?;
                journal.close()?;
            } else if let Some(container) = ran {
                told.push(format!(
                    "migration {id} brought `{}`; its source has to say whether it stays",
                    container.name
                ));
            } else {
                let leftovers = self.unwind(&journal, Vec::new(), true).await;
                told.push(format!("migration {id} was interrupted and is undone"));
                told.extend(
                    leftovers
                        .iter()
                        .map(|leftover| format!("could not be undone: {leftover}")),
                );
                if leftovers.is_empty() {
                    journal.close()?;
                }
            }
        }
        Ok(told)
    }

    /// The container that a migration brought here, if it is there.
    async fn brought_by(&self, journal: &Journal) -> Result<Option<Container>, Error> {
        for container in journal.effects().iter().filter_map(Effect::restored) {
            match self.podman.inspect(container.as_str()).await {
                Ok(container) => return Ok(Some(container)),
                Err(error) if error.is_not_found() => {}
                // Podman has its name and no more, as after a removal that has failed half-way.
                Err(podman::Error::Refused { .. }) if !podman::remains::runs(container) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(None)
    }

    /// The journal of a migration that an earlier agent of this host began.
    fn left_behind(&self, id: &MigrationId) -> Result<Option<Journal>, Error> {
        let path = self.config.incoming_dir().join(format!("{id}.jsonl"));
        Ok(path.exists().then(|| Journal::open(&path)).transpose()?)
    }

    /// Where a migration stands that an earlier agent of this host began.
    pub(super) async fn stage_left_behind(&self, id: &MigrationId) -> Result<Stage, Error> {
        let Some(journal) = self.left_behind(id)? else {
            return Ok(Stage::Unknown);
        };
        let brought = self.brought_by(&journal).await?;
        Ok(match brought {
            Some(container) if container.is_running() => Stage::Running,
            _ => Stage::Prepared,
        })
    }

    /// The same for a migration that an earlier agent of this host began, or that has been committed.
    pub(super) async fn commit_left_behind(&self, id: &MigrationId) -> Result<Nothing, Error> {
        if let Some(journal) = self.left_behind(id)? {
            let_in(&journal).await?;
            let_memory_go(&journal)?;
            self.gather(&journal).await;
            journal.close()?;
        }
        Ok(Nothing {})
    }

    /// The same for a migration that an earlier agent of this host began.
    pub(super) async fn undo_left_behind(&self, id: &MigrationId) -> Result<Undone, Error> {
        let Some(journal) = self.left_behind(id)? else {
            return Ok(Undone {
                leftovers: Vec::new(),
            });
        };
        let leftovers = self.unwind(&journal, Vec::new(), true).await;
        self.make_sure_it_is_gone(&journal, &leftovers).await?;
        if leftovers.is_empty() {
            journal.close()?;
        }
        Ok(Undone { leftovers })
    }

    /// Whether a copy runs, or might yet. What Podman cannot remove (its disk is full) and nothing of which
    /// is alive is a left-over, and no reason for the source to keep its container frozen.
    async fn may_run(&self, container: &ContainerId, journal: &Journal) -> Result<bool, Error> {
        if podman::remains::runs(container) {
            return Ok(true);
        }
        if !self.podman.exists(container.as_str()).await? {
            return Ok(false);
        }
        if !podman::remains::would_be_seen()
            || podman::remains::restore_under_way(journal.written()?)
        {
            return Ok(true);
        }
        match self.podman.inspect(container.as_str()).await {
            Ok(container) => Ok(!matches!(
                container.status,
                podman::Status::Created
                    | podman::Status::Initialized
                    | podman::Status::Stopped
                    | podman::Status::Exited
                    | podman::Status::Removing
            )),
            // Podman has no more than its name.
            Err(podman::Error::NotFound { .. } | podman::Error::Refused { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// The source will thaw its container when it is told that all is undone.
    pub(super) async fn make_sure_it_is_gone(
        &self,
        journal: &Journal,
        leftovers: &[String],
    ) -> Result<(), Error> {
        for container in journal.effects().iter().filter_map(Effect::restored) {
            if self.may_run(container, journal).await? {
                return Err(Error::StillThere {
                    container: container.clone(),
                    reasons: leftovers.join("; "),
                });
            }
        }
        Ok(())
    }
}
