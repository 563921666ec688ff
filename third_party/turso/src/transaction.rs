//! Transactions.

use std::ops::Deref;

use crate::{Connection, Result};

/// When a transaction takes the lock that writing needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransactionBehavior {
    /// With its first write.
    Deferred,
    /// At its start.
    Immediate,
}

/// A transaction on a connection, through which its statements run. Dropped without
/// [`commit`](Self::commit), it changes nothing.
#[derive(Debug)]
pub struct Transaction<'c> {
    connection: &'c Connection,
}

impl<'c> Transaction<'c> {
    pub(crate) fn begin(connection: &'c Connection, behavior: TransactionBehavior) -> Result<Self> {
        connection.inner.execute_batch(match behavior {
            TransactionBehavior::Deferred => "BEGIN DEFERRED",
            TransactionBehavior::Immediate => "BEGIN IMMEDIATE",
        })?;
        Ok(Self { connection })
    }

    /// Makes the changes permanent; when that fails, none of them is.
    pub async fn commit(self) -> Result<()> {
        Ok(self.connection.inner.execute_batch("COMMIT")?)
    }
}

impl Deref for Transaction<'_> {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        self.connection
    }
}

impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        // A failed statement may have ended it, and so has a commit.
        if !self.connection.inner.is_autocommit() {
            // Nothing is left to tell: closing the connection rolls back too.
            let _ = self.connection.inner.execute_batch("ROLLBACK");
        }
    }
}
