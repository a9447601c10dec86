// Command dexpeer is Dex with its SQLite store, for the bench alone: one client, 50 connectors that let one user in each.
// env: PORT, SECRET, DB (a file), WEB (Dex's folder web).
package main

import (
	"context"
	"fmt"
	"net/http"
	"os"

	"github.com/dexidp/dex/server"
	"github.com/dexidp/dex/storage"
	"github.com/dexidp/dex/storage/sql"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
)

func main() {
	logger := &logrus.Logger{Out: os.Stderr, Formatter: &logrus.TextFormatter{}, Level: logrus.ErrorLevel}
	database := &sql.SQLite3{File: os.Getenv("DB")}
	kept, err := database.Open(logger)
	if err != nil {
		panic(err)
	}
	issuer := "http://127.0.0.1:" + os.Getenv("PORT")
	clients := []storage.Client{{ID: "bench", Secret: os.Getenv("SECRET"), RedirectURIs: []string{issuer + "/cb"}, Name: "bench"}}
	kept = storage.WithStaticClients(kept, clients)
	var connectors []storage.Connector
	for number := range 50 {
		name := fmt.Sprintf("mock%d", number)
		connectors = append(connectors, storage.Connector{ID: name, Type: "mockCallback", Name: name})
	}
	kept = storage.WithStaticConnectors(kept, connectors)
	one, err := server.NewServer(context.Background(), server.Config{
		Issuer: issuer, Storage: kept, SkipApprovalScreen: true, Logger: logger,
		Web: server.WebConfig{Dir: os.Getenv("WEB")}, PrometheusRegistry: prometheus.NewRegistry(),
	})
	if err != nil {
		panic(err)
	}
	panic(http.ListenAndServe("127.0.0.1:"+os.Getenv("PORT"), one))
}
