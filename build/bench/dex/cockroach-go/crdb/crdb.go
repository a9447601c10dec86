// Package crdb stands in for the retries of CockroachDB, which are not used with SQLite.
package crdb

import "database/sql"

// ExecuteTx runs fn in one transaction.
func ExecuteTx(db *sql.DB, fn func(*sql.Tx) error) error {
	tx, err := db.Begin()
	if err != nil {
		return err
	}
	if err = fn(tx); err != nil {
		tx.Rollback()
		return err
	}
	return tx.Commit()
}
